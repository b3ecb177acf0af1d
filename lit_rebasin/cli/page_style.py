"""How a page looks, by day and by night."""

STYLE = """
:root {
  color-scheme: light dark;
  --text: #1c2024; --soft: #5b6470; --page: #ffffff; --panel: #f4f6f8; --line: #d9dee4; --accent: #0072b2; --note: #fff6e0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e6e9ed; --soft: #a3adb8; --page: #15181c; --panel: #1f242a; --line: #363d45; --accent: #56b4e9; --note: #3a3018;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.8rem 0 0.9rem; padding-bottom: 0.35rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.08rem; margin: 2rem 0 0.6rem; overflow-wrap: anywhere; }
h4 { font-size: 1rem; margin: 1.6rem 0 0.2rem; }
p { margin: 0.5rem 0; max-width: 75ch; overflow-wrap: anywhere; }
.about, figcaption, caption { color: var(--soft); }
.about { margin-top: 0.4rem; }
.note {
  background: var(--note); border-left: 4px solid #e69f00; border-radius: 4px; padding: 0.7rem 1rem; margin: 1.4rem 0 0;
}
.note ul { margin: 0.2rem 0 0; padding-left: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding-top: 0.6rem; font-size: 0.9rem; }
th, td { padding: 0.42rem 1.1rem 0.42rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; font-weight: 600; padding-right: 2rem; }
thead th { color: var(--soft); font-weight: 600; font-size: 0.9rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1.2rem; align-items: flex-start; margin-top: 1rem; }
figure { margin: 1rem 0 0; max-width: 100%; }
.figures figure { margin: 0; }
figure img {
  display: block; max-width: 100%; height: auto; background: #ffffff; border: 1px solid var(--line); border-radius: 8px;
  padding: 10px;
}
figcaption { font-size: 0.9rem; margin-top: 0.4rem; width: 0; min-width: 100%; }  /* as wide as its picture */
pre {
  background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 0.8rem 1rem; margin: 0.5rem 0;
  overflow-x: auto; font: 0.85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
pre.wrapped { white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: 0.8rem 0; }
summary { cursor: pointer; color: var(--accent); font-weight: 600; }
@media print { main { max-width: none; padding: 0; } figure, table { break-inside: avoid; } }
"""
