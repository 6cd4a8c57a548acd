"""Routed attention as functions on tensors, and a module built of them.

    RegionGrid.fit(H, W, regions)       how a map of any size is cut into regions
    route_regions(...) -> Routing       which key regions each query region attends to
    routed_attention(..., routing)      attention along those routes
    BiLevelRoutingAttention(...)        all of it as a module, (B, H, W, C) in and out
    depthwise_conv(...)                 a depthwise convolution of such a map, with what is added to it
"""
from .attention import IMPLS, choose_impl, routed_attention, unsupported
from .bra import BiLevelRoutingAttention
from .depthwise import depthwise_conv
from .layout import conv_channels_last
from .regions import RegionGrid
from .routing import Routing, region_means, route_regions

__all__ = [
    "IMPLS",
    "BiLevelRoutingAttention",
    "RegionGrid",
    "Routing",
    "choose_impl",
    "conv_channels_last",
    "depthwise_conv",
    "region_means",
    "route_regions",
    "routed_attention",
    "unsupported",
]
