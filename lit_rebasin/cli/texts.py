"""What `lit-rebasin --help` and the help of each command say; imports nothing slow."""

from lit_rebasin import __version__

HELP = f"""lit-rebasin {__version__}: continual learning by re-basin

usage: lit-rebasin fit --config FILE.yaml [--method NAME] [--KEY VALUE ...]
       lit-rebasin benchmark --config FILE.yaml [--methods A,B] [--seeds 0,1,2] [--data_dir DIR] [--output_dir DIR] [--KEY VALUE ...]
       lit-rebasin sweep --config FILE.yaml --vary KEY=V1,V2 [--vary ...] --output_dir DIR [--method NAME] [--KEY VALUE ...]
       lit-rebasin report RUN_DIR [--output FILE.html]
       lit-rebasin inspect MODEL --input SHAPE [--model.NAME VALUE ...] [--json] [--figure FILE]
       lit-rebasin align A B --model MODEL (--input SHAPE | --data FILE.npz) [--method NAME] [--output FILE]
       lit-rebasin merge A B [C ...] --output FILE --model MODEL (--input SHAPE | --data FILE.npz) [--method NAME]

fit        trains one method over the stream, with TensorBoard logs and checkpoints
benchmark  runs several methods over several seeds; prints a table, writes results.json, results.md and pictures
sweep      runs one method under many settings, on held-back training data, and lists them by accuracy; goes on where it was stopped
report     makes one page of HTML of a benchmark or a fit: table, accuracies, every merge, configuration and command
inspect    prints which neurons, channels and heads of a network may be permuted together, what is fixed and why
align      permutes the neurons of checkpoint A towards those of checkpoint B; prints the barrier between them before and after
merge      aligns checkpoints and merges them into one; prints what each of them and the merge loses on data

methods of fit: finetune, replay, no-merge (the training of rebasin alone), average (merging without alignment), rebasin;
of benchmark also Avalanche's ewc, lwf, agem, der, er-ace, cumulative and joint (and its own finetune and replay), and mc-sgd, clewi, rebasin-il

Any key of the YAML file can be overridden, as in --data.n_tasks 10 or --merge.alpha 0.7.
lit-rebasin fit --help, benchmark --help and sweep --help explain the keys of most use, --help_all lists every one;
lit-rebasin inspect --help, lit-rebasin align --help and lit-rebasin merge --help explain theirs.
"""

KEYS = """
 --config FILE               the YAML file; both commands read the same one
 --print_config              print the configuration in full, defaults too, and stop
 --help_all                  list every key with its type and default

 --output_dir DIR            where results, logs and checkpoints go (runs)
 --data_dir DIR              folder of the data sets (data), or the .npz of the benchmark arrays
 --threads N                 CPU threads; a small network is fastest with 1

 --data.benchmark NAME       rotated-digits, rotated-mnist, permuted-mnist, split-mnist, rotated-fashion-mnist, split-cifar10,
                             split-cifar100 or arrays (rotated-digits)
 --data.scenario NAME        domain, class or task; the benchmark's own by default
 --data.n_tasks N            number of tasks; the benchmark's own by default
 --data.epochs_per_task N    epochs spent on each task (5)
 --data.batch_size N         new examples in a batch (64)
 --data.replay_per_class K   examples kept of each class of each task, all of one that has fewer (0)
 --data.replay_transform PATH  import path of a transform of what is replayed, such as lit_rebasin.RandomShift
 --data.validation_fraction F  validate on this share of the training data, held back, not on the test data (0)
 --data.download true        fetch a data set that is missing

 --model.backbone PATH       import path of the network; its arguments as --model.backbone.NAME VALUE
 --model.n_features N        width of the backbone's output, if it ends in features and not in logits
 --model.optimizer PATH      import path of the optimizer (torch.optim.AdamW); its arguments as --model.optimizer.NAME VALUE
 --model.weighting NAME      examples, or tasks: those replayed weigh as all tasks before, whatever their number (examples)
 --model.lr_decay F          what the learning rate is multiplied with from one task to the next (1)
 --model.lr_schedule NAME    within a task: constant, or linear, down to 0 (constant)
 --model.distillation W      weight of how far predictions of replayed examples are from those of the network after the last task (0)
 --model.mixup true          on mixtures of replayed images with new ones (false)

 --merge.alpha A             weight of the previous model in [0, 1], or line-search, fisher or layer-fisher (0.8)
 --merge.combine NAME        average, the point of the path at alpha; or regmean, layers fitted to both networks on the inputs of each (average)
 --merge.method NAME         weights, covariance, frank-wolfe, activations, sinkhorn, straight-through or identity (weights)
 --merge.cost NAME           what sinkhorn minimises: incremental, midpoint, random-point, l2, l1 or cosine (incremental)
 --merge.start NAME          where a task begins: previous, fresh (newly initialised) or perturbed, half of either (previous)

 --trainer.KEY VALUE         any argument of Lightning's Trainer
"""

ARCHITECTURE = """
 --model PATH                import path of a module's class, of a function that makes one or of a module, such as
                             torchvision.models.resnet18; files of the current folder are found too
 --model.NAME VALUE          an argument of that class or function; those that a LightningModule saved are taken from A
 --input SHAPE               shape of an example input, as in 1,3,224,224 (1,16:int64 for another type, NAME=1,16 by name); not needed
                             with --data
 --data FILE.npz             examples x as the network takes them, and class indices y, with which barriers are measured
 --batch_size N              the most examples in a batch (500)
 --points N                  points of the path that are measured, ends included (21)
"""

MATCHING = """
 --cost NAME                 what sinkhorn and straight-through minimise: midpoint, random-point or incremental, the loss of the networks
                             between; or l1, l2 or cosine, the distance of the weights (midpoint with data, else l2)
 --init NAME                 the method to start from (weights for sinkhorn and straight-through, else identity)
 --options.NAME VALUE        an argument of the method, such as --options.restarts 10; a wrong one is answered with the list
 --seed N                    of everything drawn (0)
"""

WRITING = """
 --figure FILE               where the loss along the path is drawn, a .png, .svg or .pdf (beside the output, or path.png); with --data
 --overwrite                 replace files that are there already
 --help_all                  list the arguments of MODEL
"""

FORMATS = """Checkpoints are state dicts (.pt, .pth), Lightning checkpoints (.ckpt) or .safetensors; a prefix such as model. or net. before
every name is found. Code in them is never run: files that torch.load(weights_only=True) refuses are refused. What is written is a plain
state dict of MODEL, in the format of the suffix, also where the input is a Lightning checkpoint."""

COMMAND_HELP = {
    "fit": f"""usage: lit-rebasin fit --config FILE.yaml [--method NAME] [--KEY VALUE ...]

Train one method over the stream, with TensorBoard logs and checkpoints. Defaults are in parentheses.

 --method NAME               finetune, replay, no-merge, average or rebasin (rebasin)
 --seed_everything N         seed of everything drawn (0)
 --ckpt_path FILE            checkpoint from which to go on, or last for the latest of the same run
{KEYS}""",
    "benchmark": f"""usage: lit-rebasin benchmark --config FILE.yaml [--methods A,B] [--seeds 0,1,2] [--KEY VALUE ...]

Run several methods over several seeds; print a table, write results.json, results.md and pictures. Defaults are in parentheses.

 --methods A,B               any of finetune, ewc, lwf, agem, replay, der, er-ace, mc-sgd, clewi, rebasin-il, no-merge, average, rebasin,
                             cumulative, joint (finetune,replay,rebasin); the first seven and the last two are run by Avalanche's own
                             strategies
 --per_method ...            what differs for a method, best in the file: ewc: {{ewc_lambda: 10}}, rebasin: {{merge.alpha: 0.7}}
 --seeds A,B                 one run a method and seed (0,1,2)
 --parallel_tasks N          tasks trained at a time, each in a process of its own, where --merge.start is fresh (1)
 --processes N               runs at a time, each in a process of its own (1)
 --overwrite                 replace results that are in output_dir already
 --resume                    go on with what is in output_dir: finished runs are kept, others go on after their last finished task; runs of
                             Avalanche's strategies, of rebasin-il and of --parallel_tasks begin anew
{KEYS}""",
    "sweep": f"""usage: lit-rebasin sweep --config FILE.yaml --vary KEY=V1,V2 [--vary ...] --output_dir DIR [--method NAME] [--KEY VALUE ...]

Run one method under every combination of settings, measured on training data that is held back, never on test data; list them by accuracy.
Trials that are finished in DIR are not run again. Defaults are in parentheses.

 --vary KEY=V1,V2            a key and its values, as in merge.alpha=0.5,0.7,0.9; once more for another key
 --trials N                  draw N of the combinations (all of them)
 --draw_seed N               of that draw (0)
 --method NAME               any method of benchmark (rebasin)
 --seeds A,B                 one run a combination and seed (100); not those of the final benchmark
 --validation_fraction F     share of each task's training data that is held back (0.1)
 --processes N               runs at a time (1)
 --parallel_tasks N          tasks trained at a time, each in a process of its own, where --merge.start is fresh (1)
{KEYS}""",
    "report": """usage: lit-rebasin report RUN_DIR [--output FILE.html]

Make one page of HTML of a run, with its pictures in it; nothing is loaded from anywhere, so that the file can be sent as it is. It has the
table of the methods, accuracy over the tasks, the accuracy matrices, the loss along every merge before and after alignment, the neurons
moved in each permutation group, alpha over the tasks, curves and last pictures of the monitors, the configuration, the versions and the
command; and it says what is missing, damaged event files among it.

 RUN_DIR                     the output folder of a benchmark, or of a fit, or any folder with TensorBoard event files that RebasinMerge,
                             ContinualMonitor or another monitor has written
 --output FILE.html          where the page goes (RUN_DIR/report.html); an earlier one is replaced
""",
    "inspect": """usage: lit-rebasin inspect MODEL --input SHAPE [--model.NAME VALUE ...] [--json] [--figure FILE]

Find the permutation groups of a network, check them with random permutations, and print their sizes, the axes that each moves, what is
fixed and why, and the share of the parameters that can move.

 MODEL, or --model PATH      import path of a module's class, of a function that makes one or of a module, such as
                             torchvision.models.resnet50; files of the current folder are found too
 --model.NAME VALUE          an argument of that class or function
 --input SHAPE               shape of an example input, as in 1,3,224,224; several inputs: the option again; 1,16:int64 for another
                             type than float32 (integers are drawn from 0 and 1); NAME=1,16 for an input by name
 --checkpoint FILE           take the weights from this state dict, Lightning checkpoint or .safetensors, and the arguments that a
                             LightningModule saved in it
 --json                      print everything as JSON, the spec in the form that PermutationSpec.from_json reads
 --figure FILE               draw which group moves which axis, to a .png, .svg or .pdf file
 --help_all                  list the arguments of MODEL
""",
    "align": f"""usage: lit-rebasin align A B --model MODEL (--input SHAPE | --data FILE.npz) [--method NAME] [--output FILE] [--KEY VALUE ...]

Find the permutation of the neurons of A that carries it towards B, the reference, which stays put. Print how far they are from each other
before and after, and with data the barrier of loss and accuracy between them, drawn as well.

{FORMATS}

 --method NAME               identity, weights, frank-wolfe; with x: covariance, activations; with x and y: straight-through, sinkhorn
                             (weights)
 --output FILE               write A, permuted, to this .safetensors, .pt, .pth or .ckpt file
{ARCHITECTURE}{MATCHING}{WRITING}""",
    "merge": f"""usage: lit-rebasin merge A B [C ...] --output FILE --model MODEL (--input SHAPE | --data FILE.npz) [--KEY VALUE ...]

Align A to B, the reference, and merge the two; or bring three checkpoints or more into the frame of A, and average them. Print the loss of
each and of the merge, if there is data, and draw the path between two.

{FORMATS}

 --output FILE               the merge, a .safetensors, .pt, .pth or .ckpt file
 --method NAME               of two: identity, weights, frank-wolfe; with x: covariance, activations; with x and y: straight-through,
                             sinkhorn (weights); of more: cycle-consistent, merge-many, barycenter (cycle-consistent)
 --alpha A                   weight of B, the reference, in [0, 1] (0.5); or line-search, the lowest loss on the path, which needs x and y;
                             or fisher, by the curvatures at both ends, which needs x
 --statistics NAME           what the merge has corrected: none; repair, rescale or reestimate (BatchNorm alone), which need x; data-free
                             (BatchNorm, without data, of two). Default: repair with data; without, data-free for two networks with
                             BatchNorm, else none
{ARCHITECTURE}{MATCHING}{WRITING}""",
}
