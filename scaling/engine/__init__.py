"""Plans a sweep, runs it and keeps its folders. Imports no JAX in the process that decides.

Words used throughout:

- cell: one run of a grid, with its labels and whether it is held out; its *row* is the cell with its plan and cost.
- pack: rows that train together as one program; each is a *member* of it. A lone run is a pack of one.
- trunk: a run that carries others, equal but for horizon and cooldown; a *rider* is such a run while it is carried,
  a *branch* once it goes on by itself from the checkpoint that the trunk left it.
- heir: a run that starts from the weights of another, its *parent*, which leaves them in a checkpoint of the heir's.
- task: one call of a worker, most often one pack; tasks wait in a *line*, the longest first.
- sign: a small file in the work folder that says what a process does now (``--status`` reads it).
- record: what a run leaves behind, one JSON file under ``runs/``.
- manifest: ``sweep.json``: what a sweep planned, did and cost.
- group: cells that have laws of their own (``fit.by``, ``fit.compare``); the processes of one model are a
  ``distributed.Group``.
"""
