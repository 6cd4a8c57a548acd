"""Routed attention as functions on tensors, a module built of them, and what is fused around it.

    RegionGrid.fit(H, W, regions)       how a map of any size is cut into regions
    route_regions(...) -> Routing       which key regions each query region attends to
    routed_attention(..., routing)      attention along those routes
    dense_attention(...)                of all queries to all keys, by PyTorch
    AttentionRecord(...)                what weights are computed from, to look at them
    BiLevelRoutingAttention(...)        all of it as a module, (B, H, W, C) in and out
    depthwise_conv(...)                 a depthwise convolution of such a map, with what is added to it
    depthwise_conv2d(...)               one of any stride, of a (B, C, H, W) map
    layer_norm(...), add_layer_norm(...)  layer norm, and that of a sum, in one pass over memory
    apply_linear(...), linear_gelu(...)  a linear layer, alone or with its GELU, without copies where a CPU infers
    fx_leaf(...)                        a module that torch.fx records whole
"""
from .attention import IMPLS, choose_impl, routed_attention, unsupported
from .bra import BiLevelRoutingAttention
from .checks import check_positive, check_rates, check_whole
from .dense import dense_attention
from .depthwise import DepthwiseConv, DepthwiseConv2d, depthwise_conv, depthwise_conv2d
from .layout import (
    channels_first,
    conv_channels_last,
    crop_map,
    fixed_if_traced,
    flatten_map,
    is_open,
    missing_to_multiple,
    settle,
)
from .linear import apply_linear, linear_gelu, reuses_memory
from .norm import add_layer_norm, choose_norm_impl, layer_norm, norm_unsupported
from .onednn import is_plain
from .precision import without_autocast
from .record import AttentionRecord, PositionBias
from .regions import RegionGrid
from .routing import Routing, region_means, route_regions
from .support import LAYER_IMPLS, check_layer_impl
from .transforms import fx_leaf, is_exported, is_traced_or_transformed

__all__ = [
    "IMPLS",
    "LAYER_IMPLS",
    "AttentionRecord",
    "BiLevelRoutingAttention",
    "DepthwiseConv",
    "DepthwiseConv2d",
    "PositionBias",
    "RegionGrid",
    "Routing",
    "add_layer_norm",
    "apply_linear",
    "channels_first",
    "check_layer_impl",
    "check_positive",
    "check_rates",
    "check_whole",
    "choose_impl",
    "choose_norm_impl",
    "conv_channels_last",
    "crop_map",
    "dense_attention",
    "depthwise_conv",
    "depthwise_conv2d",
    "fixed_if_traced",
    "flatten_map",
    "fx_leaf",
    "is_exported",
    "is_open",
    "is_plain",
    "is_traced_or_transformed",
    "layer_norm",
    "linear_gelu",
    "missing_to_multiple",
    "norm_unsupported",
    "region_means",
    "reuses_memory",
    "route_regions",
    "routed_attention",
    "settle",
    "unsupported",
    "without_autocast",
]
