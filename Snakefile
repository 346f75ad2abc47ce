# Which runs are stale, and in which order: every rule is one `sgd run` line that can be pasted.
#
# A rule's only output is the stamp of a finished run. Snakemake deletes declared outputs before a
# job and after a failure; rows, checkpoints and students are kept out of its reach, so a killed
# run goes on where it stopped. The released folders are never outputs.
#
#   snakemake --profile profiles/default --config profile=smoke start=oracle rows=all -n
from sgd.runs import find_notebook, plan, stamp_path, write_params
from sgd.files import root

PROFILE = config.get("profile", "cpu")
START = config.get("start", "rollout")
ROWS = config.get("rows", "main")
PLAN = {step.name: step for step in plan(PROFILE, START, ROWS)}
BUILD = f"build/{PROFILE}"
DONE = BUILD + "/done/{name}.json"

# The parameters of each run, rewritten only if they changed: a plot option never retrains.
for step in PLAN.values():
    write_params(step.name, find_notebook(step.notebook), PROFILE, step.changes)


def inputs(wildcards):
    "Notebook, parameters, and the stamps of the runs before."
    step = PLAN[wildcards.name]
    notebook = f"nbs/experiments/{step.notebook}.ipynb"
    stamps = [DONE.format(name=name) for name in step.needs]
    return [notebook, f"{BUILD}/params/{step.name}.json", *stamps]


def options(wildcards):
    "What sets this run apart, as the command line says it."
    pairs = [f"{name}={value}" for name, value in PLAN[wildcards.name].changes.items()]
    return f"--set {' '.join(pairs)}" if pairs else ""


def command(notebook):
    return f"sgd run {notebook} --profile {PROFILE} --name {{wildcards.name}} {{params.options}}"


rule all:
    input: [DONE.format(name=name) for name in PLAN]


rule oracle:
    input: inputs
    output: DONE.replace("{name}", r"{name,10_oracle\..*}")
    params: options=options
    threads: 2
    shell: command("10_oracle")


rule annotate:
    input: inputs
    output: DONE.replace("{name}", r"{name,20_annotate\..*}")
    params: options=options
    shell: command("20_annotate")


rule train:
    input: inputs
    output: DONE.replace("{name}", r"{name,30_train\..*}")
    params: options=options
    shell: command("30_train")


rule play:
    input: inputs
    output: DONE.replace("{name}", r"{name,40_play\..*}")
    params: options=options
    shell: command("40_play")


rule report:
    input: inputs
    output: DONE.replace("{name}", r"{name,[03567][05]_[a-z]+}")
    params: options=options, notebook=lambda w: PLAN[w.name].notebook
    threads: 2
    shell: command("{params.notebook}")
