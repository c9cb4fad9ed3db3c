"""What stands behind the names of DeepSpeed that `faces.py` lists. Imported under this name it is a package like any other.

    entry.py        initialize                     settings.py     the JSON, read as settings of shardwise
    engine.py       DeepSpeedEngine                boundaries.py   where a step ends
    sections.py     its optimizer and scheduler
    optimizer.py    what initialize returns        optimizers.py, schedules.py   DeepSpeed's own ones
    gathering.py    GatheredParameters             building.py     zero.Init
    fragments.py    safe_get_full_*                leaves.py       leaf modules
    checkpoints.py  save and load_checkpoint       zero_to_fp32.py, whole_model.py
    comm.py         torch.distributed              front/accelerator.py  get_accelerator()

It touches nothing of shardwise whose name begins with an underscore.
"""
