"""A page of HTML, read for what it shows."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """What a page holds: figures by id, the cells of its table, the text of everything, and every attribute."""

    def __init__(self, path):
        super().__init__()
        self.figures, self.rows, self.tags, self.attributes, self.words = {}, [], [], [], []
        self._figure = self._cell = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        found = dict(attrs)
        if tag == "figure":
            self._figure = found["id"]
        elif tag == "img":
            self.figures[self._figure] = found
        elif tag == "tr":
            self.rows.append([])
        self._cell = tag if tag in ("th", "td", "style") else None

    def handle_data(self, data):
        if self._cell == "style":
            return
        self.words.append(data)
        if self._cell:
            self.rows[-1].append(data)
            self._cell = None

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())
