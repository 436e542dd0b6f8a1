"""What stands beside the weights in a folder that timm and model hubs load: config.json, README.md.

timm reads such folders by create_model("local-dir:FOLDER" or "hf-hub:USER/NAME", pretrained=True).
"""

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from byol_pytorch.checkpoint.weights import timm_config


def check_hub(net: nn.Module, notes: Mapping[str, Any]) -> None:
    """Raise ValueError for a network that timm cannot build anew by what is known of it."""
    if notes["architecture"] is None or notes["model_args"] is None:
        raise ValueError(
            f"timm cannot build this {type(net).__name__} from what is known of it, so a folder "
            "for its create_model makes no sense; expected a model of timm, and model_args= with "
            "what it was given beside the name. Give a path that ends in .safetensors for the "
            "weights alone."
        )
    if notes["padding"] is not None:
        raise ValueError(
            "This network pads as TensorFlow does (same_padding), which timm cannot know; expected "
            "torch's padding for a folder. Give a path that ends in .safetensors."
        )


def config(net: Any, notes: Mapping[str, Any]) -> bytes:
    """timm's config.json: without a classifier unless model_args has classes, ours for the images.

    The source of the keys is timm/models/_hub.py, save_config_for_hf.
    """
    known, args = timm_config(net), dict(notes["model_args"])
    classes = args.pop("num_classes", 0)
    channels = args.get("in_chans", known.get("input_size", (3,))[0])
    size = notes["image_size"] or known.get("input_size", (3, 224, 224))[1:]
    images = {"input_size": [channels, *size], "mean": notes["mean"], "std": notes["std"]}
    traits = {name: known.get(name) for name in ("interpolation", "first_conv", "classifier")}
    fixed = known.get("fixed_input_size", False) and not args.get("dynamic_img_size", False)
    pretrained = {"num_classes": classes, **images, **traits, "fixed_input_size": fixed}
    whole = {
        "architecture": notes["architecture"],
        "num_classes": classes,
        "num_features": net.num_features,
        "model_args": args,
        "pretrained_cfg": {name: v for name, v in pretrained.items() if v is not None},
    }
    return json.dumps(whole, indent=2).encode()


def card(notes: Mapping[str, Any]) -> bytes:
    """The README.md of the folder: a header for hubs, and how to load it. Licence and data are the
    user's to add."""
    height, width = notes["image_size"] or ("any", "any")
    expects = f"images of {height} x {width} pixels in [0, 1]"
    if notes["mean"]:
        expects += f", normalised by mean {notes['mean']} and std {notes['std']}"
    return f"""---
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- byol
- self-supervised-learning
# license: (yours to choose, for example mit)
---

# {notes["architecture"]} pre-trained with BYOL

(On what it was trained, how long, and what it reached: yours to say.)

```python
import timm

net = timm.create_model("hf-hub:USER/NAME", pretrained=True)      # or local-dir:FOLDER; (B, D)
```

Input: {expects}.
Method: BYOL (arXiv 2006.07733), byol_pytorch {notes["byol_pytorch"]}.
""".encode()
