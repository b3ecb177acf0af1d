"""Bad words and bad YAML."""

from .bad_inputs import BENCHMARK, FIT, INSPECT, MERGE, SWEEP, BadInput, directory, networks, nothing, text

CONFIG = ["--config=c.yaml"]


def _yaml(name, content, says, command=FIT):
    return BadInput(f"{name} in YAML", text("c.yaml", content), [*command, *CONFIG], says)


def _words(name, words, says, command=FIT):
    return BadInput(name, nothing, [*command, *words], says)


_BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
_CODE = "!!python/object/apply:os.mkdir [ran]"

FILES = [
    _yaml("an unknown section", "colour: blue\n", "there is no key 'colour'"),
    _yaml(
        "a mistyped section", "treiner:\n  max_epochs: 2\n", "'treiner.max_epochs'; did you mean 'trainer.max_epochs'"
    ),
    _yaml("an unknown key", "data:\n  n_taks: 2\n", "'data.n_taks'; did you mean 'data.n_tasks'"),
    _yaml(
        "an unknown key of a class",
        "model: {optimizer: {class_path: torch.optim.SGD, init_args: {lrr: 1}}}\n",
        "there is no key 'lrr'",
    ),
    _yaml(
        "a duplicate section", "data: {n_tasks: 2}\nmodel: {}\ndata: {n_tasks: 3}\n", "c.yaml, line 3: .*'data' twice"
    ),
    _yaml("a duplicate key", "data:\n  n_tasks: 2\n  n_tasks: 3\n", "c.yaml, line 3: .*'n_tasks' twice"),
    _yaml("another file", "config: d.yaml\n", "c.yaml, line 1: config names another file"),
    _yaml("a set", "data: !!set {a, b}\n", "c.yaml, line 1: the tag set is not for a configuration"),
    _yaml(
        "a key with dots and in its section",
        "data.n_tasks: 2\ndata: {n_tasks: 3}\n",
        "c.yaml, line 2: 'data.n_tasks' is given twice",
    ),
    *(
        _yaml(
            f"{value} for a folder of {command[0]}", f"output_dir: {value}\n", "output_dir must be a text, got", command
        )
        for value in ("3", "null", "[a]")
        for command in (FIT[:-1], BENCHMARK[:-1])
    ),
    _yaml("a tab", "data:\n\tn_tasks: 2\n", r"c.yaml, line 2: .*'\\t'"),
    _yaml("an open bracket", "data: {n_tasks: 2\n", "c.yaml, line 2: .*expected ',' or '}'"),
    _yaml("a wrong indentation", "data:\n   n_tasks: 2\n  seed: 3\n", "c.yaml, line 3"),
    _yaml("nothing", "", "c.yaml is empty"),
    _yaml("nothing but a comment", "# data\n", "c.yaml is empty"),
    _yaml("a list at the top", "- a\n- b\n", "c.yaml holds a list, .*must be keys with values"),
    _yaml("a text at the top", "hello\n", "c.yaml holds a text, .*must be keys with values"),
    _yaml("two documents", "data: {n_tasks: 2}\n---\ndata: {n_tasks: 3}\n", "c.yaml, line 2"),
    _yaml("Latin-1", "data: {n_tasks: 2}  # \xe9\n".encode("latin-1"), "c.yaml is not UTF-8"),
    _yaml("bytes of another kind", b"\xff\xfe\x00\x01data", "c.yaml is not UTF-8"),
    _yaml("a NUL", b"data: {n_tasks: 2}\x00\n", "c.yaml.* special characters are not allowed"),
    _yaml("code", f"data: {{n_tasks: {_CODE}}}\n", "c.yaml, line 1: .*python/object/apply:os.mkdir"),
    _yaml(
        "code for an optimizer",
        "model: {optimizer: {class_path: subprocess.Popen, init_args: {args: [mkdir, ran]}}}\n",
        '"model.optimizer": .* expects a function or a callable class',
    ),
    _yaml(
        "code for a callback",
        "trainer: {callbacks: [{class_path: subprocess.Popen, init_args: {args: [mkdir, ran]}}]}\n",
        "trainer.callbacks",
    ),
    _yaml(
        "a number for a class",
        "trainer: {callbacks: [{class_path: 3}]}\n",
        "c.yaml, line 1: class_path must be a text, such as torch.optim.SGD",
    ),
    _yaml("a key that is a list", "? [a, b]\n: 3\n", "c.yaml, line 1: .*key"),
    _yaml("itself", "data: &d\n  n_tasks: *d\n", "c.yaml, line 1: .*holds itself"),
    _yaml("a thousand million anchors", _BOMB, "c.yaml .*entries"),
    _yaml("an unknown anchor", "data: *nowhere\n", "c.yaml, line 1: .*undefined alias 'nowhere'"),
    _yaml("a number for a section", "data: 3\n", "c.yaml, line 1: data must be keys with values"),
    _yaml("null for a section", "model: null\n", "c.yaml, line 1: model must be keys with values"),
    _yaml(
        "a word for a number",
        "model: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: fast}}}\n",
        "optimizer.*number.*fast",
    ),
    _yaml(
        "a fraction for a whole number", "data: {batch_size: 1.5}\n", "data.batch_size must be a whole number, got 1.5"
    ),
    _yaml("a list for a number", "data: {n_tasks: [2]}\n", r"data.n_tasks must be a whole number or null, got \[2\]"),
    _yaml(
        "a mistyped class",
        "trainer: {callbacks: [{class_path: lit_rebasin.SharpnesMonitor}]}\n",
        "no attribute 'SharpnesMonitor'; did you mean 'SharpnessMonitor'",
    ),
    _yaml(
        "what a class refuses",
        "trainer: {callbacks: [{class_path: lit_rebasin.SharpnessMonitor, init_args: {examples: 0}}]}\n",
        "^examples must be a whole number of at least 1, got 0",
    ),
    _yaml("per_method with a number", "per_method: 3\n", "per_method must be a mapping", BENCHMARK),
    _yaml("per_method of no method", "per_method: {magic: {merge.alpha: 1}}\n", "no method 'magic'", BENCHMARK),
    _words("per_method of no method for fit", ['--per_method={"magic": {"merge.alpha": 1}}'], "no method 'magic'"),
    _words(
        "a key of per_method that is none for fit",
        ["--method=average", '--per_method={"average": {"lr": 1}}'],
        "per_method of 'average': there is no key 'lr'",
    ),
    _words(
        "per_method with what all methods share for fit",
        ['--per_method={"replay": {"data.n_tasks": 3}}'],
        "per_method of 'replay': data.n_tasks is the same for all methods",
    ),
    _yaml(
        "per_method with a word for a number",
        "per_method: {average: {merge.alpha: high}}\n",
        "per_method of 'average': merge.alpha must be .*, got high",
        BENCHMARK,
    ),
    _yaml(
        "seeds that are words",
        "seeds: [a]\n",
        "seeds must be a whole number or a text, got a",
        ["benchmark", "--output_dir=out"],
    ),
    _yaml(
        "methods that are a mapping",
        "methods: {a: 1}\n",
        "methods must be a list or a text",
        ["benchmark", "--output_dir=out"],
    ),
    _yaml("a tab for a sweep", "data:\n\tn_tasks: 2\n", r"c.yaml, line 2: .*'\\t'", SWEEP),
    BadInput("a missing configuration", nothing, [*FIT, *CONFIG], "there is no configuration file c.yaml"),
    BadInput(
        "a missing configuration without a suffix",
        nothing,
        [*FIT, "--config=mine"],
        "there is no configuration file mine",
    ),
    BadInput(
        "a folder for a configuration",
        directory("c.yaml"),
        [*BENCHMARK, *CONFIG],
        "there is no configuration file c.yaml",
    ),
    BadInput(
        "JSON that is cut off", text("c.json", '{"data": {"n_tasks"'), [*FIT, "--config=c.json"], "c.json, line 1"
    ),
]

NUMBERS = [
    _words("no batch", ["--data.batch_size=0"], "batch_size must be a whole number of at least 1, got 0"),
    _words("a negative batch", ["--data.batch_size=-1"], "batch_size must be a whole number of at least 1, got -1"),
    _words("no epochs", ["--data.epochs_per_task=0"], "epochs_per_task must be a whole number of at least 1, got 0"),
    _words(
        "no epochs of a benchmark",
        ["--data.epochs_per_task=0"],
        "epochs_per_task must be a whole number of at least 1",
        BENCHMARK,
    ),
    _words("no tasks", ["--data.n_tasks=0"], "n_tasks must be a whole number of at least 1, got 0"),
    _words("negative replay", ["--data.replay_per_class=-1"], "replay_per_class must be a whole number of at least 0"),
    _words("a share that is all", ["--data.validation_fraction=1"], r"validation_fraction must lie in \[0, 1\), got 1"),
    _words(
        "a share that is no number",
        ["--data.validation_fraction=nan"],
        "data.validation_fraction must be a number, got nan",
    ),
    _words("alpha above 1", ["--merge.alpha=2"], r"alpha .* must lie in \[0, 1\], got 2"),
    _words("alpha that is no number", ["--merge.alpha=.nan"], r"alpha .* must lie in \[0, 1\], got nan"),
    _words("a learning rate below 0", ["--model.optimizer.lr=-1"], "model.optimizer: Invalid learning rate: -1"),
    _words(
        "a learning rate in words", ["--model.optimizer.lr=fast"], "model.optimizer.lr must be a number.*, got fast"
    ),
    _words("threads below 1", ["--threads=0"], "threads must be from 1 to 1024, got 0"),
    _words("threads without end", ["--threads=1000000000"], "threads must be from 1 to 1024, got 1000000000"),
    *(
        _words(
            f"{value} for {name} of {command[0]}",
            [f"--trainer.{name}={value}"],
            f"trainer.{name} must be above 0, got",
            command,
        )
        for name in ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval", "limit_train_batches")
        for value in ("0", "-1")
        for command in (FIT, BENCHMARK)
    ),
    *(
        _words(f"{name} below 0", [f"--trainer.{name}=-1"], f"trainer.{name} must be at least 0, got -1")
        for name in ("log_every_n_steps", "min_epochs", "min_steps")
    ),
    _words("no logger", ["--trainer.logger=false"], "trainer.logger false would not be heeded"),
    _words("a folder beside output_dir", ["--trainer.default_root_dir=x"], "trainer.default_root_dir x would not be"),
    _words(
        "a logger for all runs",
        ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=x"],
        "trainer.logger would mix up the runs of a benchmark",
        BENCHMARK,
    ),
    _words(
        "a clipping of no number", ["--trainer.gradient_clip_val=.nan"], "gradient_clip_val must be a finite number"
    ),
    _words(
        "accumulation without end",
        [f"--trainer.accumulate_grad_batches={10**24}"],
        "trainer.accumulate_grad_batches must be at most 2147483647, got 10",
    ),
    _words("tasks without end", [f"--data.n_tasks={10**20}"], "n_tasks must be at most 100000, got 10"),
    _words("a batch without end", [f"--data.batch_size={10**100}"], "batch_size must be at most 2147483647, got 10"),
    _words("a width below 0", ["--model.backbone.hidden_size=-4"], "negative dimension -4"),
    _words(
        "a number of features below 1",
        ["--model.n_features=0"],
        "n_features must be a whole number of at least 1, got 0",
    ),
    _words(
        "a precision without its package", ["--trainer.precision=transformer-engine"], "trainer: .*transformer_engine"
    ),
    BadInput("a seed of merge below 0", networks, [*MERGE, "--seed=-1"], "seed must be from 0 to .*, got -1"),
    BadInput(
        "a seed of merge without end", networks, [*MERGE, f"--seed={2**64}"], "seed must be from 0 to .*, got 18446"
    ),
    _words(
        "nothing to vary",
        ["--vary", "model.optimizer.lr=[]"],
        "a value is empty, or there twice, or there is none",
        SWEEP,
    ),
    _words(
        "a sweep that is told to go on", ["--resume"], "sweep has no option --resume; the same command goes on", SWEEP
    ),
    _words("nothing for a folder", ["--output_dir="], "output_dir must be a text, got nothing"),
    _words("nothing for a folder of a sweep", ["--output_dir="], "sweep needs --output_dir", SWEEP),
    *(
        BadInput(
            f"a file for {section}",
            text("s.yaml", "alpha: 0.1\nalpha: 0.9\n"),
            [*FIT, section, "s.yaml"],
            f"{section} is a section",
        )
        for section in ("--merge", "--model", "--data", "--trainer")
    ),
    BadInput("an empty method of merge", networks, [*MERGE, "--method="], "--method needs a value"),
    BadInput("an empty choice of statistics", networks, [*MERGE, "--statistics="], "--statistics needs a value"),
    _words("threads in words", ["--threads=two"], "threads must be a whole number or null, got two"),
    _words("processes below 1", ["--processes=0"], "processes must be at least 1, got 0", BENCHMARK),
    _words("a seed below 0", ["--seed_everything=-1"], "seed_everything: -1 is not in bounds"),
    _words("a seed in words", ["--seeds=a"], "seeds must be whole numbers such as 0,1,2, got 'a'", BENCHMARK),
    _words("a seed twice", ["--seeds=1,1"], "seeds must be different whole numbers", BENCHMARK),
    _words("seeds of a sweep in words", ["--seeds=a"], "seeds must be whole numbers", SWEEP),
    _words("more epochs than the stream", ["--trainer.max_epochs=7"], "max_epochs=7.* pass max_epochs=2"),
    _words(
        "part of a task",
        ["--trainer.max_epochs=3", "--data.epochs_per_task=2"],
        "max_epochs 3 ends inside a task",
        BENCHMARK,
    ),
    _words(
        "devices that there are not", ["--trainer.devices=-7"], "trainer: `devices` selected .* should be an int > 0"
    ),
]

_NET = """import torch

class {name}(torch.nn.Linear):
    def __init__(self):
        super().__init__(64, 10)
{begins}

    def forward(self, x{second}):
        out = super().forward(x.flatten(1))
{ends}
        return out
"""


def _network(name, says, begins="", second="", ends=""):
    """Name a network of a file beside, one a row, for Python imports a module once."""
    module = f"net_{name.lower()}"
    indented = {key: f"        {line}" for key, line in {"begins": begins, "ends": ends}.items()}
    code = _NET.format(name=name, second=second, **indented)
    words = [word for word in FIT if not word.startswith("--model.backbone")]
    return BadInput(
        f"a network {name}", text(f"{module}.py", code), [*words, f"--model.backbone={module}.{name}"], says
    )


NETWORKS = [
    _network("OfTwo", "does not take images of 1 x 8 x 8, .*: TypeError .*'second'", second=", second"),
    _network(
        "OfTuples", "The backbone OfTuples returns a tuple, but the stream has n_classes=10", ends="return out, out"
    ),
    _network("OfNothing", "The backbone OfNothing returns a NoneType", ends="return None"),
    _network("OfKeys", "does not take images of 1 x 8 x 8, .*: KeyError 'colour'", ends="raise KeyError('colour')"),
    _network("Unasked", "does not take images .*: NotImplementedError", ends="raise NotImplementedError"),
    _network("Unmade", "cannot be made: KeyError: 'colour'", begins="raise KeyError('colour')"),
    _network("Divided", "cannot be made: ZeroDivisionError", begins="1 / 0"),
    _network("Ended", r"has ended with SystemExit\(0\)", begins="raise SystemExit(0)"),
]

NAMES = [
    _words("an unknown command", [], "there is no command 'fti'; did you mean 'fit'", ["fti"]),
    _words("an unknown option", ["--data.n_taks=3"], "there is no option --data.n_taks; did you mean --data.n_tasks"),
    _words(
        "an unknown option of benchmark",
        ["--overwrit"],
        "there is no option --overwrit; did you mean --overwrite",
        BENCHMARK,
    ),
    _words("an option of another command", ["--methods=replay"], "fit has no option --methods; use --method"),
    _words("an option without its value", ["--data.n_tasks"], "--data.n_tasks.*expected one argument"),
    _words("an unknown option of sweep", ["--vari", "a=1"], "there is no option --vari; did you mean --vary", SWEEP),
    _words(
        "an unknown option of report", ["--ouput", "a.html"], "got --ouput; did you mean --output", ["report", "out"]
    ),
    _words("an unknown option of inspect", ["--model.widht=3"], "--model.widht; did you mean --model.width", INSPECT),
    BadInput(
        "an unknown option of merge",
        networks,
        [*MERGE, "--statistic=none"],
        "merge has no option --statistic; did you mean --statistics",
    ),
    BadInput(
        "an unknown option of its network",
        networks,
        [*MERGE, "--model.widht=3"],
        "--model.widht; did you mean --model.width",
    ),
    BadInput(
        "an unknown option of its method",
        networks,
        [*MERGE, "--options.restart=3"],
        "no option --options.restart; it has .*restarts",
    ),
    _words("an unknown method", ["--method=rebasn"], "there is no method 'rebasn'; did you mean 'rebasin'"),
    _words(
        "an unknown method of benchmark",
        ["--methods=average,ewcc"],
        "there is no method 'ewcc'; did you mean 'ewc'",
        BENCHMARK,
    ),
    _words(
        "an unknown benchmark", ["--data.benchmark=rotated-minst"], "benchmark must be one of .*, got 'rotated-minst'"
    ),
    _words(
        "an unknown scenario", ["--data.scenario=klass"], "data.scenario must be domain, class, task or null, got klass"
    ),
    _words(
        "an unknown backbone",
        ["--model.backbone=avalanche.models.SimpleMPL"],
        "model.backbone: module 'avalanche.models' has no attribute 'SimpleMPL'; did you mean 'SimpleMLP'",
    ),
    _words("a backbone of no module", ["--model.backbone=nowhere.Net"], "model.backbone: No module named 'nowhere'"),
    _words("a backbone that is none", ["--model.backbone=pathlib.Path"], "model.backbone: .*pathlib.Path does not"),
    _words(
        "a backbone for other images",
        ["--model.backbone.input_size=60"],
        "model.backbone does not take images of 1 x 8 x 8",
    ),
    _words(
        "an argument of no backbone",
        ["--model.backbone.hiden_size=3"],
        "SimpleMLP has no argument 'hiden_size'; did you mean 'hidden_size'",
    ),
    _words("no words for fit", [], "arguments are required: model.backbone", ["fit"]),
    _words("no words for benchmark", [], "arguments are required: model.backbone", ["benchmark"]),
    _words("no words for sweep", [], "sweep needs what to vary", ["sweep"]),
    _words("no words for align", [], "align needs the import path of a network", ["align"]),
    _words("no words for report", [], "report needs the folder of a run", ["report"]),
    _words(
        "a word without dashes",
        ["data.n_tasks=3"],
        "there is no use for 'data.n_tasks=3': every key begins with two dashes",
    ),
    _words("--config without a file", ["--config"], "^--config needs a file$"),
    _words("no backbone", [], "arguments are required: model.backbone", ["fit", "--output_dir=out"]),
    _words(
        "an unknown optimizer",
        ["--model.optimizer=torch.optim.Adan"],
        "model.optimizer: module 'torch.optim' has no attribute 'Adan'; did you mean 'Adam'",
    ),
    _words(
        "an unknown optimizer without its module",
        ["--model.optimizer=Adan"],
        "model.optimizer must be an import path, got Adan; did you mean torch.optim.Adam",
    ),
    _words("an unknown accelerator", ["--trainer.accelerator=warp"], "accelerator='warp'"),
    _words("an unknown precision", ["--trainer.precision=12"], "trainer.precision must be .*bf16.*, got 12"),
    _words("an unknown merge", ["--merge.method=magic"], "merge.method must be identity, weights, .*, got magic"),
    _words(
        "options of a merge that are a list",
        ["--merge.options=[1]"],
        r"merge.options must be a mapping or null, got \[1\]",
    ),
    _words(
        "a mistyped monitor",
        ["--trainer.callbacks+=SharpnesMonitor"],
        "trainer.callbacks must be an import path or null, got SharpnesMonitor; did you mean lit_rebasin.SharpnessMonitor",
    ),
    _words(
        "what a monitor refuses",
        ["--trainer.callbacks+=lit_rebasin.SharpnessMonitor", "--trainer.callbacks.examples=0"],
        "^examples must be a whole number of at least 1, got 0",
    ),
    _words(
        "an argument of no monitor",
        ["--trainer.callbacks+=lit_rebasin.SharpnessMonitor", "--trainer.callbacks.exampels=3"],
        "lit_rebasin.SharpnessMonitor has no argument 'exampels'; did you mean 'examples'",
    ),
    _words(
        "what a monitor refuses of a benchmark",
        ["--trainer.callbacks+=lit_rebasin.SharpnessMonitor", "--trainer.callbacks.examples=0"],
        "^examples must be a whole number of at least 1, got 0",
        BENCHMARK,
    ),
    _words(
        "a reference that is missing",
        ["--trainer.callbacks+=lit_rebasin.ConnectivityMonitor", "--trainer.callbacks.reference=no.ckpt"],
        "^checkpoint no.ckpt cannot be read: No such file or directory",
    ),
    _words("two dashes for a value", ["--input=--"], "^--input needs a value, got --", INSPECT),
    _words(
        "an input larger than any number",
        [*INSPECT[:2], "--input=9999999999999999999"],
        "^--input 9999999999999999999 cannot be made: TypeError: ",
        [],
    ),
    _words("a margin larger than any number", [f"--merge.margin={'1' * 400}"], "int too large to convert to float"),
    _words(
        "null for an argument of no kind",
        ["--model.backbone.hidden_size=null"],
        "^an argument of model, data, merge or a callback is of a wrong kind: .*NoneType",
    ),
    _words("a precision that is none", ["--trainer.precision=a"], "^trainer.precision must be .* bf16 or null, got a"),
    _words(
        "several devices of Avalanche's",
        ["--trainer.devices=2", "--methods=ewc,average"],
        "^trainer.devices 2 does not go with ewc, which Avalanche runs",
        BENCHMARK,
    ),
    _words(
        "several devices for each of several processes",
        ["--trainer.devices=2", "--processes=2"],
        "^trainer.devices 2 does not go with --processes",
        BENCHMARK,
    ),
    _words(
        "processes that are gone after a fit",
        ["--trainer.strategy=ddp_spawn", "--trainer.devices=2"],
        "^trainer.strategy ddp_spawn trains in processes that do not say what they have measured; use ddp",
    ),
    _words(
        "tasks in parallel of Avalanche's",
        ["--parallel_tasks=2", "--methods=finetune,ewc"],
        "--parallel_tasks .* finetune, ewc cannot",
        BENCHMARK,
    ),
    _words("a key of a sweep", ["--vary", "merge.alhpa=0.1"], "merge.alhpa; did you mean --merge.alpha", SWEEP),
]

ROWS = [*FILES, *NUMBERS, *NETWORKS, *NAMES]
