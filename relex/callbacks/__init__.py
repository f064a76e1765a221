"""For the training's own process: callbacks for transformers' Trainer and TRL.

    from relex.callbacks import JumpCallback, StopOnFile

Nothing but torch, numpy, transformers and accelerate, which every Trainer has, is imported here; and nothing else of
relex imports this.
"""

from relex.callbacks.jump import JumpCallback
from relex.callbacks.stop import StopOnFile

__all__ = ["JumpCallback", "StopOnFile"]
