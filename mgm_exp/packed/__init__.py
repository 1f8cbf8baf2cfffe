"""Sweeps whose trials train in one process over one base: ``hydra/launcher=packed``.

    sweep  --- :mod:`.slots`: hands as many trials as fit to one process, takes up those of one that died
    process -- :mod:`.process`: composes them, and has them told together
    stories -- :mod:`.stories`: every trial is an ordinary run with a folder of its own; only training is done together

The training itself is :mod:`mgm_exp.train.pack`. See docs/launchers.md.
"""
