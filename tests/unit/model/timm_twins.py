"""timm's models of the same architecture as ours, on the meta device until weights are put in."""

from functools import partial

import timm
import torch
from small_models import images_for, randomise
from timm.layers import SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn

from vitscale.model import TABLE

TOLERANCE = 1e-5

# timm has the shape under another name, with other weights.
_SAME_SHAPE = {"vit_so400m_patch14_224": "vit_so400m_patch14_siglip_224"}


def timm_of_row(name, variant):
    """timm's model for a row of the table; of timm's class where it has no model of that name."""
    timm_name = _SAME_SHAPE.get(name, TABLE[name].timm_name)
    if timm_name is None:
        return timm_of_class(variant)
    with torch.device("meta"):
        changes = {} if variant.depth == TABLE[name].variant.depth else {"depth": variant.depth}
        return timm.create_model(timm_name, pretrained=False, num_classes=variant.num_classes, **changes).eval()


def timm_of_class(variant, **arguments):
    """timm's class with the arguments that mean what the variant's fields mean."""
    swiglu = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    own = {
        "img_size": variant.image_px,
        "patch_size": variant.patch_kernel,
        "in_chans": variant.in_chans,
        "embed_dim": variant.embed_dim,
        "depth": variant.depth,
        "num_heads": variant.num_heads,
        # timm cuts the product off: half a unit more keeps it whole.
        "mlp_ratio": ((2 if variant.act == "swiglu" else 1) * variant.mlp_hidden + 0.5) / variant.embed_dim,
        "qkv_bias": variant.qkv_bias,
        "qk_norm": variant.qk_norm,
        "num_classes": variant.num_classes,
        "class_token": variant.pool == "token",
        "global_pool": variant.pool,
        "fc_norm": False,
        "reg_tokens": variant.reg_tokens,
        "init_values": variant.layer_scale or None,
        "norm_layer": partial(nn.LayerNorm, eps=variant.norm_eps, bias=variant.norm_bias),
        **({"block_fn": ParallelScalingBlock} if variant.parallel else {}),
        **(swiglu if variant.act == "swiglu" else {"act_layer": variant.act}),
        **arguments,
    }
    with torch.device("meta"):
        return (VisionTransformerDistilled if variant.distilled else TimmViT)(**own, weight_init="skip").eval()


def parallel_for_timm(state):
    """The tensors of one parallel block as timm fuses them: MLP, queries, keys and values in one projection."""
    names = {"norm1": "in_norm", "attn.proj": "attn_out_proj", "mlp.fc2": "mlp_out_proj", "ls1": "ls"}
    names |= {"attn.q_norm": "q_norm", "attn.k_norm": "k_norm"}
    fused = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module in names:
            fused[f"{names[module]}.{kind}"] = tensor
    fused["in_proj.weight"] = torch.cat([state["mlp.fc1.weight"], state["attn.qkv.weight"]])
    if "attn.qkv.bias" in state:
        fused["in_proj.bias"] = torch.cat([state["mlp.fc1.bias"], state["attn.qkv.bias"]])
    else:
        fused["mlp_bias"] = state["mlp.fc1.bias"]
    return fused


def state_for_timm(model):
    """The model's tensors under timm's names."""
    if not model.variant.parallel:
        return model.state_dict()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("blocks.")}
    for index, block in enumerate(model.blocks):
        fused = parallel_for_timm(block.state_dict())
        state |= {f"blocks.{index}.{name}": tensor for name, tensor in fused.items()}
    return state


def assert_weights_travel_both_ways(ours, theirs, dtype=torch.float32):
    """Random weights put from ours, on the meta device, into timm's and back: the same features and logits."""
    randomise(ours.to_empty(device="cpu")).to(dtype)
    # Assigned, not copied: a gigantic model fits into memory once, not twice.
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
    images = images_for(ours, batch=1).to(dtype)
    expected = outputs(theirs, images)
    assert_close(outputs(ours, images), expected)
    ours.to("meta").load_state_dict(theirs.state_dict(), strict=True, assign=True)
    assert_close(outputs(ours, images), expected)


@torch.no_grad()
def outputs(model, images):
    features = model.forward_features(images)
    return features, model.forward_head(features)


def assert_close(ours, theirs):
    for tensor, expected in zip(ours, theirs, strict=True):
        assert expected.std() > 0.01  # the comparison is not one of zeros
        assert (tensor - expected).abs().max().item() <= TOLERANCE
