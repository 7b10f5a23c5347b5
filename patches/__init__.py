"""Every change to another library's behaviour: explicit, probed, idempotent, undoable. The table is in README.md."""

if __name__ != "vlm_grpo.patches":
    raise ImportError('Import this package as "vlm_grpo.patches": the folder "patches" is its home, not its name.')
