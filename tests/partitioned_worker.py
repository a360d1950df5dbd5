"""What each of two ranks runs for test_partitioned.py: build models under ZeRO and write down what they hold.

    python -m torch.distributed.run --nproc-per-node=2 -m tests.partitioned_worker FOLDER CASES

CASES is JSON: name -> the stage and overrides of a config. Rank 0 writes FOLDER/<case>.pt.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before torch is imported
    from uvlm.distributed import prepare_environment

    prepare_environment()

import torch

from data_pipeline.vocab import Vocab
from uvlm.check import check
from uvlm.config import load_config


def main(folder: Path, cases: dict[str, Any]) -> None:
    import deepspeed

    from uvlm.distributed import leave, world
    from uvlm.engine import Engine, start
    from uvlm.train import build

    faulthandler.dump_traceback_later(240, exit=True)
    start()
    for name, case in cases.items():
        config = load_config(folder / "config.yaml", case["overrides"])
        tree = check(config, world().size)
        tree["zero_optimization"] |= {"stage": case["stage"], "stage3_param_persistence_threshold": 0}
        if case["stage"] < 3:
            tree["zero_optimization"] = {"stage": case["stage"]}
        model, sentence = build(config, Vocab.load(config.data.tokenizer), tree)
        held = {key: parameter.numel() for key, parameter in model.named_parameters()}
        shares = {key: p.ds_tensor.numel() for key, p in model.named_parameters() if hasattr(p, "ds_tensor")}
        engine = Engine(model, config, tree)
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            values = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
        rotation = model.backbone.model.rotary_emb.inv_freq
        trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
        if world().rank == 0:
            result = {
                "held": held,
                "shares": shares,
                "values": values,
                "rotation": rotation,
                "trained": trained,
                "tied": model.backbone.lm_head.weight is model.backbone.model.embed_tokens.weight,
                "sentence": sentence,
            }
            torch.save(result, folder / f"{name}.pt")
        engine._engine.destroy()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
