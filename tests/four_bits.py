"""The weights of bitsandbytes' 4-bit layers by the book, in numpy: what its own kernels are compared with."""

import numpy as np
import torch


def looked_up(layer) -> np.ndarray:
    """float32 [out, in]: code by code, with the scales of the blocks, which may be quantised too, around their mean."""
    state = layer.weight.quant_state
    packed = layer.weight.data.flatten().view(torch.uint8).numpy()
    codes = np.stack([packed >> 4, packed & 15], axis=1).ravel()
    scales = state.absmax.numpy()
    if state.nested:
        inner = state.state2
        scales = inner.code.numpy()[scales] * np.repeat(inner.absmax.numpy(), 256)[: len(scales)]
        scales = scales + float(state.offset)
    codes = codes[: layer.out_features * layer.in_features]
    values = state.code.numpy()[codes] * np.repeat(scales, state.blocksize)[: len(codes)]
    return values.reshape(layer.out_features, layer.in_features)


def as_plain_layers(model: torch.nn.Module) -> torch.nn.Module:
    """The model with a plain linear layer of those weights in the place of every 4-bit layer: bitsandbytes' product is
    another on every kind of CPU."""
    import bitsandbytes

    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            with torch.no_grad():
                plain.weight.copy_(torch.from_numpy(looked_up(module)))
                if module.bias is not None:
                    plain.bias.copy_(module.bias)
            model.set_submodule(name, plain)
    return model
