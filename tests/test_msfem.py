"""MSFEM against equations 1 to 7 and parameter counts; FPN and MFPN against their definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from paper_form import fuse, multi_scale
from strategies import parameter_count
from torch import Tensor, nn
from torch.nn import functional

from comask.config import ModelConfig
from comask.models.neck import FPN, MFPN, MSFEM, ChannelAttention

DOWNSAMPLE = 256 * 256 * 9 + 2 * 256  # convolution without bias, GroupNorm
SMOOTH = 256 * 256 * 9 + 256
ATTENTION = 2 * 256 * 64
MODES = ("independent", "chain", "tied")


def settings(channels: int, mode: Any, branches: int, **others: Any) -> ModelConfig:
    return ModelConfig(
        channels=channels, msfem_mode=mode, msfem_branches=branches, head_channels=256, **others
    )


def msfem(mode: str = "independent", branches: int = 4, channels: int = 16) -> MSFEM:
    torch.manual_seed(1)
    return MSFEM(settings(channels, mode, branches, norm_groups=channels // 8))


@pytest.mark.parametrize(
    ("mode", "branches", "downsamples"),
    [
        ("independent", 4, 1 + 2 + 3),
        ("independent", 3, 1 + 2),
        ("chain", 4, 3),
        ("tied", 4, 1),
        *((mode, 2, 1) for mode in MODES),
        *((mode, 1, 0) for mode in MODES),
    ],
)
def test_parameter_count_is_the_sum_of_the_parts(
    mode: str, branches: int, downsamples: int
) -> None:
    with torch.device("meta"):
        module = MSFEM(settings(256, mode, branches))
    reduce = branches * 256 * 256 + 256
    assert parameter_count(module) == downsamples * DOWNSAMPLE + reduce + ATTENTION + SMOOTH


def test_default_module_has_the_parameters_of_the_design() -> None:
    with torch.device("meta"):
        module = MSFEM(ModelConfig())
    assert parameter_count(module) == 4_427_264


def by_hand(layers: nn.Module, x: Tensor) -> Tensor:
    """C2 with its GN and ReLU, by functional calls."""
    conv, norm, _ = layers
    x = functional.conv2d(x, conv.weight, stride=2, padding=1)
    return functional.relu(functional.group_norm(x, norm.num_groups, norm.weight, norm.bias))


@pytest.mark.parametrize("mode", MODES)
def test_equation_1(mode: str) -> None:
    module, x = msfem(mode), torch.randn(2, 16, 13, 10)
    expected = [x]
    for i in range(1, 4):
        if mode == "independent":  # branch i has i convolutions of its own
            layers = list(module.branches[i - 1])
        elif mode == "chain":  # F_i = C2_i(... C2_1(F))
            layers = [module.branches[j][0] for j in range(i)]
        else:  # F_i = C2(C2(... F))
            layers = [module.branches[0][0]] * i
        assert len(layers) == i
        current = x
        for layer in layers:
            current = by_hand(layer, current)
        expected.append(
            functional.interpolate(current, (13, 10), mode="bilinear", align_corners=True)
        )
    actual = multi_scale(module, x)
    assert len(actual) == 4
    for ours, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize(("mode", "changed"), [("independent", 1), ("chain", 3), ("tied", 3)])
def test_first_convolution_reaches_the_scales_that_share_it(mode: str, changed: int) -> None:
    module, x = msfem(mode), torch.randn(1, 16, 16, 16)
    before = multi_scale(module, x)
    nn.init.normal_(module.branches[0][0][0].weight)
    after = multi_scale(module, x)
    differs = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert differs == [False] + [True] * changed + [False] * (3 - changed)


@pytest.mark.parametrize("mode", ["independent", "chain", "tied"])
def test_receptive_fields_are_3_7_and_15_pixels(mode: str) -> None:
    module = msfem(mode)
    for block in [m for m in module.modules() if isinstance(m, nn.GroupNorm)]:
        nn.init.ones_(block.weight)
    for branch in module.branches:
        for block in branch:
            block[1] = nn.Identity()  # its statistics span the whole map
            nn.init.constant_(block[0].weight, 0.01)
    for i, expected in ((1, 3), (2, 7), (3, 15)):
        x = torch.ones(1, 16, 65, 65, requires_grad=True)
        scale = multi_scale(module, x)[i]
        # The image's centre is a pixel of the coarse maps too, so resizing reads this pixel alone.
        (gradient,) = torch.autograd.grad(scale[0, :, 32, 32].sum(), x)
        rows = gradient.abs().sum(dim=(0, 1, 3)).nonzero()[:, 0]
        columns = gradient.abs().sum(dim=(0, 1, 2)).nonzero()[:, 0]
        middle = torch.arange(32 - expected // 2, 33 + expected // 2)
        assert torch.equal(rows, middle)
        assert torch.equal(columns, middle)


def test_attention_follows_equations_4_to_6() -> None:
    torch.manual_seed(2)
    attention, x = ChannelAttention(16, 4), torch.randn(3, 16, 5, 7)
    squeeze, excite = attention.squeeze.weight.double(), attention.excite.weight.double()
    assert squeeze.shape == (4, 16)
    v1 = x.double().flatten(2).mean(-1)
    hidden = torch.einsum("rc,bc->br", squeeze, v1).clamp(min=0)
    v2 = 1 / (1 + torch.exp(-torch.einsum("cr,br->bc", excite, hidden)))
    out = attention(x)
    torch.testing.assert_close(out.double(), x * v2[:, :, None, None], atol=1e-6, rtol=1e-5)
    ratio = out / x
    assert ((ratio > 0) & (ratio < 1)).all()


@pytest.mark.parametrize("mode", MODES)
@given(seed=st.integers(0, 2**16), height=st.integers(1, 40), width=st.integers(1, 40))
@hypothesis_settings(max_examples=20, deadline=None)
def test_reducing_each_scale_equals_reducing_their_concatenation(
    mode: str, seed: int, height: int, width: int
) -> None:
    torch.manual_seed(seed)
    module, x = msfem(mode), torch.randn(2, 16, height, width)
    assert isinstance(module.reduce, nn.Conv2d)
    nn.init.normal_(module.reduce.weight)  # a new module passes the first scale alone
    nn.init.normal_(module.reduce.bias)
    expected = fuse(module, x)
    found = module.fuse(x)
    largest = float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, atol=2e-6 * largest, rtol=0)
    module.split_reduce()
    assert torch.equal(module.fuse(x), found)


@pytest.mark.parametrize("branches", [1, 2, 4])
def test_output_follows_equations_2_to_7(branches: int) -> None:
    module, x = msfem(branches=branches), torch.randn(2, 16, 6, 9)
    assert isinstance(module.reduce, nn.Conv2d)
    fused = torch.cat(multi_scale(module, x), dim=1)
    fused = torch.einsum("oc,bchw->bohw", module.reduce.weight[:, :, 0, 0], fused)
    fused = module.attention(fused + module.reduce.bias[:, None, None])
    expected = functional.conv2d(fused, module.smooth.weight, module.smooth.bias, padding=1)
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (2, 2), (7, 9), (25, 42)])
def test_odd_and_tiny_maps_keep_their_shape(mode: str, size: tuple[int, int]) -> None:
    x = torch.randn(1, 16, *size)
    out = msfem(mode)(x)
    assert out.shape == x.shape
    assert torch.isfinite(out).all()


def backbone_features(height: int, width: int) -> list[Tensor]:
    sizes = ((4, 4), (6, 8), (8, 16), (10, 32))
    return [torch.randn(2, channels, height // s, width // s) for channels, s in sizes]


def test_fpn_adds_the_coarser_map() -> None:
    fpn, features = FPN((4, 6, 8, 10), 16), backbone_features(96, 160)
    pyramid = fpn(features)
    sizes = [(24, 40), (12, 20), (6, 10), (3, 5)]
    assert [tuple(p.shape) for p in pyramid] == [(2, 16, *size) for size in sizes]
    merged = fpn.lateral[3](features[3])
    torch.testing.assert_close(pyramid[3], fpn.output[3](merged))
    for i in (2, 1, 0):
        doubled = merged.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        merged = fpn.lateral[i](features[i]) + doubled
        torch.testing.assert_close(pyramid[i], fpn.output[i](merged))


def mfpn_of(**options: Any) -> MFPN:
    torch.manual_seed(2)
    config = settings(16, "independent", 4, norm_groups=4, **options)
    mfpn = MFPN((4, 6, 8, 10), config)
    with torch.no_grad():
        for parameter in mfpn.parameters():  # unlike the identity that it starts as
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return mfpn


@pytest.mark.parametrize(("size", "p6"), [((32, 32), (1, 1)), ((64, 96), (1, 2))])
def test_mfpn_is_one_module_after_each_of_five_levels(
    size: tuple[int, int], p6: tuple[int, int]
) -> None:
    mfpn = mfpn_of()
    features = backbone_features(*size)
    pyramid = mfpn(features)
    assert len(set(mfpn.modules_per_level)) == len(pyramid) == 5
    assert pyramid[4].shape[2:] == p6
    levels = mfpn.fpn(features)
    levels.append(levels[3][:, :, ::2, ::2])
    for module, level, out in zip(mfpn.modules_per_level, levels, pyramid, strict=True):
        torch.testing.assert_close(out, module(level))
        assert out.shape == level.shape


def test_modules_can_replace_the_fpns_convolutions() -> None:
    mfpn, features = mfpn_of(msfem_place="replace"), backbone_features(64, 96)
    pyramid = mfpn(features)
    assert len(set(mfpn.modules_per_level)) == 4
    assert not any(isinstance(module, nn.Conv2d) for module in mfpn.fpn.output)
    torch.testing.assert_close(
        pyramid[3], mfpn.modules_per_level[3](mfpn.fpn.lateral[3](features[3]))
    )
    assert torch.equal(pyramid[4], pyramid[3][:, :, ::2, ::2])


def test_residual_attention_is_the_authors() -> None:
    torch.manual_seed(4)
    config = settings(16, "independent", 2, norm_groups=4, residual_attention=True)
    module = MSFEM(config)
    x = torch.randn(2, 16, 9, 7)
    attended = module.attention(fuse(module, x))
    assert module.norm is not None
    expected = (attended + module.norm(module.smooth(attended))).clamp(min=0)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("branches", [1, 2, 4])
def test_a_new_module_is_the_identity(branches: int) -> None:
    torch.manual_seed(5)
    module = MSFEM(settings(64, "independent", branches, norm_groups=16))
    x = torch.randn(2, 64, 12, 20) * 5
    torch.testing.assert_close(module(x), x)
    module(x).square().sum().backward()
    every = dict(module.named_parameters())
    # behind weights of 0 the first gradient is 0, as in a residual branch that starts at 0
    behind = ("branches", "attention.squeeze")
    assert [k for k, p in every.items() if not p.grad.any() and not k.startswith(behind)] == []
