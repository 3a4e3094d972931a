"""model.py against naive re-computations: positions, attention, blocks, padding, windows, initial weights, teacher."""

import copy
import math
from collections import Counter

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model import (
    CONVS, Attention, Block, Classifier, Encoder, Recogniser, Student, Teacher, attend, convolve, linear_softmax, regression_head,
    relative_index, resize_positions, speech_encoder, text_encoder, vision_encoder,
)  # fmt: skip
from targets import top_k_average

TARGETS = ("block", "ffn", "ffn_residual", "attention")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def vit(image_size=(16, 16), depth=2, dim=16, **changes):
    options = dict(image_size=image_size, patch=4, dim=dim, depth=depth, heads=2, ffn=2 * dim, layer_scale=0.0)
    return vision_encoder(**options | changes)


@torch.no_grad()
def scramble(module):
    """Far from the initial values, so that no zero bias, unit gain or empty table hides a mistake."""
    for p in module.parameters():
        p.add_(0.3 * torch.randn_like(p))
    return module


def close(ours, expected, **tolerance):
    torch.testing.assert_close(ours, expected, **{"rtol": 1e-4, "atol": 1e-5} | tolerance)


# ---- positions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(1, 1), (3, 3), (2, 5), (4, 1)])
def test_relative_index_is_one_row_for_each_offset_and_three_for_the_class_token(height, width):
    index = relative_index(height, width)
    rows = (2 * height - 1) * (2 * width - 1)
    for i in range(height * width):
        for j in range(height * width):
            down, right = i // width - j // width, i % width - j % width
            assert index[1 + i, 1 + j] == (down + height - 1) * (2 * width - 1) + (right + width - 1)
    assert (index[0, 1:] == rows).all() and (index[1:, 0] == rows + 1).all() and index[0, 0] == rows + 2


def test_the_bias_is_one_table_for_all_blocks_looked_up_by_offset():
    encoder = scramble(vit(image_size=(8, 12), depth=3))
    assert [n for n, _ in encoder.named_parameters() if "table" in n] == ["embed.table"]
    assert encoder.embed.table.shape == (3 * 5 + 3, 2)
    seen = []
    for block in encoder.blocks:
        block.attn.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    encoder(torch.randn(2, 3, 8, 12))
    for bias in seen:
        for head in range(2):
            for q in range(7):
                for k in range(7):
                    expected = encoder.embed.table[relative_index(2, 3)[q, k], head]
                    assert bias.expand(2, 2, 7, 7)[1, head, q, k] == expected


def test_learned_positions_are_added_to_the_patches_after_hiding_and_the_class_token_goes_in_front():
    embed = vit(learned_std=0.3, relative=False).embed
    assert embed.table is None and embed.learned.std().item() == pytest.approx(0.3, rel=0.2)
    x = torch.randn(2, 16, 16)
    placed, bias = embed.place(x)
    assert bias is None
    close(placed[:, 1:], x + embed.learned)
    close(placed[:, 0], embed.cls.expand(2, -1))


def test_resizing_the_table_keeps_it_for_the_same_grid_and_always_keeps_the_class_tokens_rows():
    table = torch.randn(7 * 9 + 3, 2)
    close(resize_positions(table, (4, 5), (4, 5)), table)
    larger = resize_positions(table, (4, 5), (6, 3))
    assert larger.shape == (11 * 5 + 3, 2) and torch.equal(larger[-3:], table[-3:])


def test_resizing_the_table_does_not_swap_rows_and_columns():
    down = torch.arange(-3.0, 4)[:, None].expand(7, 9)  # a bias that grows with the offset downwards
    table = torch.cat([down.reshape(-1, 1), torch.zeros(3, 1)])
    resized = resize_positions(table, (4, 5), (8, 3))[:-3].view(15, 5)
    assert (resized.diff(dim=0) > 0).all() and resized.diff(dim=1).abs().max() < 1e-5
    close(resized[7], torch.zeros(5))  # same row stays at offset 0


@pytest.mark.parametrize("image_size", [(16, 16), (8, 20), (4, 4)])
def test_any_image_size_that_the_patch_divides_works(image_size):
    patches = image_size[0] * image_size[1] // 16
    student = Student(vit(image_size), regression_head(16))
    mask = torch.rand(2, patches) > 0.5
    features, layers = student.encoder(torch.randn(2, 3, *image_size), mask)
    assert features.shape == (2, 1 + patches, 16) and [a.shape for a in layers] == [(2, patches, 16)] * 2
    assert student(torch.randn(2, 3, *image_size), mask).shape == (mask.sum(), 16)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="16, 8"):
        vit()(torch.randn(1, 3, 16, 8))
    with pytest.raises(ValueError, match="patch 4"):
        vit((16, 18))


def test_patches_are_row_major():
    embed = vit((8, 12)).embed
    images = torch.randn(1, 3, 8, 12)
    x, _ = embed(images)
    for t in range(6):
        top, left = 4 * (t // 3), 4 * (t % 3)
        patch = images[0, :, top : top + 4, left : left + 4]
        close(x[0, t], (embed.proj.weight * patch).sum((1, 2, 3)) + embed.proj.bias)


# ---- attention and blocks ------------------------------------------------------------------------------------------


def naive_attention(attn, x, bias):
    """One query at a time, one head at a time, the softmax written out."""
    b, t, dim = x.shape
    size = dim // attn.heads
    weight_q, weight_k, weight_v = attn.qkv.weight.split(dim)
    q, k, v = x @ weight_q.T + attn.q_bias, x @ weight_k.T, x @ weight_v.T + attn.v_bias
    k = k if attn.k_bias is None else k + attn.k_bias
    out = torch.zeros_like(x)
    for i in range(b):
        for h in range(attn.heads):
            part = slice(h * size, (h + 1) * size)
            for j in range(t):
                logits = k[i, :, part] @ q[i, j, part] / math.sqrt(size) + bias[i, h, j]
                weights = logits.exp() / logits.exp().sum()
                out[i, j, part] = weights @ v[i, :, part]
    return out @ attn.out.weight.T + attn.out.bias


@pytest.mark.parametrize("k_bias", [False, True])
def test_attention_is_softmax_of_scaled_products_plus_bias(k_bias):
    attn = scramble(Attention(12, 3, k_bias, 0.0))
    x, bias = torch.randn(2, 5, 12), torch.randn(2, 3, 5, 5)
    close(attn(x, bias), naive_attention(attn, x, bias))
    close(attn(x, None), naive_attention(attn, x, torch.zeros(2, 3, 5, 5)))


def test_attention_dropout_acts_in_training_only():
    attn = scramble(Attention(8, 2, False, 0.5))
    x = torch.randn(2, 6, 8)
    assert not torch.equal(attn(x, None), attn(x, None))
    attn.eval()
    assert torch.equal(attn(x, None), attn(x, None))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["none", "boolean", "values"])
def test_attention_in_bfloat16_is_that_of_float32(kind, autocast):
    """The way of a CPU in bfloat16 is its own; a boolean bias is True where a key is seen."""
    q, k, v = (torch.randn(2, 3, 7, 8).bfloat16().requires_grad_() for _ in range(3))
    seen = (torch.rand(2, 1, 7, 7) < 0.5) | torch.eye(7, dtype=torch.bool)
    seen[1, :, 3] = False  # sees nothing: 0, and no NaN in the gradients
    bias = {"none": None, "boolean": seen, "values": torch.randn(2, 3, 7, 7).masked_fill(~seen, -math.inf)}[kind]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = attend(q, k, v, bias, 0.0)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = attend(*exact, bias, 0.0)
    assert ours.dtype == torch.bfloat16 and expected.dtype == torch.float32
    close(ours.float(), expected, rtol=0, atol=0.04)
    for y in (ours, expected):
        y.float().square().sum().backward()
    for x, y in zip((q, k, v), exact):
        close(x.grad.float(), y.grad, rtol=0, atol=0.03 * y.grad.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_drops_weights_and_scales_up_the_rest(dtype):
    q, k, v = torch.zeros(1, 1, 1, 4, dtype=dtype), torch.zeros(1, 1, 10_000, 4, dtype=dtype), torch.ones(1, 1, 10_000, 4, dtype=dtype)
    close(attend(q, k, v, None, 0.25).float(), torch.ones(1, 1, 1, 4), rtol=0, atol=0.05)
    assert not torch.equal(attend(q, k, v, None, 0.9), attend(q, k, v, None, 0.9))


@torch.no_grad()
def naive_block(block, x, bias):
    """The block and its four targets, from the equations of the paper's appendix and of SPEC section 2."""

    def norm(layer, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias

    def ffn(x):
        hidden = x @ block.fc1.weight.T + block.fc1.bias
        return 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))) @ block.fc2.weight.T + block.fc2.bias

    gains = [1.0 if scale is None else scale for scale in (block.scale1, block.scale2)]
    if block.pre_norm:
        attention = gains[0] * naive_attention(block.attn, norm(block.norm1, x), bias)
        x = x + attention
        f = gains[1] * ffn(norm(block.norm2, x))
        out = summed = x + f
    else:
        attention = naive_attention(block.attn, x, bias)
        x = norm(block.norm1, block.alpha * x + attention)
        f = ffn(x)
        summed = block.alpha * x + f
        out = norm(block.norm2, summed)
    return {"block": out, "ffn": f, "ffn_residual": summed, "attention": attention}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "kind",
    [dict(pre_norm=True), dict(pre_norm=True, layer_scale=0.3), dict(pre_norm=False), dict(pre_norm=False, alpha=1.7)],
    ids=["pre", "pre-scaled", "post", "deepnorm"],
)
def test_a_block_and_its_four_targets(kind, target):
    block = scramble(Block(8, 2, 16, eps=1e-3, k_bias=True, target=target, **kind)).eval()
    x, bias = torch.randn(2, 5, 8), torch.randn(2, 2, 5, 5)
    expected = naive_block(block, x, bias)
    out, a = block(x, bias)
    close(out, expected["block"])
    close(a, expected[target])


def test_dropout_sits_on_both_branches_and_inside_the_ffn():
    for name in ("dropout", "ffn_dropout"):
        for pre_norm in (True, False):
            block = Block(8, 2, 16, pre_norm=pre_norm, eps=1e-6, k_bias=False, target="block", **{name: 0.5})
            x = torch.randn(2, 5, 8)
            scramble(block)
            assert not torch.equal(block(x)[0], block(x)[0]), name
            block.eval()
            assert torch.equal(block(x)[0], block(x)[0]), name


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    block = Block(4, 2, 8, pre_norm=True, eps=1e-6, k_bias=False, target="block", drop_path=0.3)
    y = torch.ones(20_000, 2, 4)
    dropped = block.branch(y, None)
    kept = dropped[:, 0, 0] > 0
    assert torch.equal(dropped, torch.where(kept, 1 / 0.7, 0.0)[:, None, None].expand_as(y)), "all of a sample, or none"
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.02)
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)
    block.eval()
    assert torch.equal(block.branch(y, None), y)


def test_drop_path_rises_linearly_over_depth():
    assert [b.drop_path for b in vit(depth=5, drop_path=0.2).blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert [b.drop_path for b in vit(depth=1, drop_path=0.2).blocks] == [0]


# ---- the encoder and the student -----------------------------------------------------------------------------------


def test_layers_are_the_outputs_of_every_block_without_the_class_token():
    encoder = scramble(vit(depth=3)).eval()
    outputs = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
    features, layers = encoder(torch.randn(2, 3, 16, 16))
    assert len(layers) == 3
    for a, out in zip(layers, outputs, strict=True):
        assert torch.equal(a, out[:, 1:])
    close(features, encoder.norm(outputs[-1]))


def test_predictions_are_those_of_the_masked_positions_row_by_row():
    student = scramble(Student(vit(), regression_head(16))).eval()
    images, mask = torch.randn(3, 3, 16, 16), torch.rand(3, 16) > 0.6
    features, _ = student.encoder(images, mask)
    expected = [student.head(features[b, 1 + t]) for b in range(3) for t in range(16) if mask[b, t]]
    close(student(images, mask), torch.stack(expected))


def test_the_student_cannot_see_what_is_hidden_and_sees_the_rest():
    student = scramble(Student(vit(), regression_head(16))).eval()
    images, mask = torch.randn(1, 3, 16, 16), torch.zeros(1, 16, dtype=torch.bool)
    mask[0, [5, 6]] = True  # row 1, columns 1 and 2
    f = student(images, mask)
    hidden, shown = images.clone(), images.clone()
    hidden[:, :, 4:8, 4:12] = 7
    shown[:, :, 4:8, 0:4] = 7
    assert torch.equal(student(hidden, mask), f)
    assert (student(shown, mask) - f).abs().max() > 1e-3


def test_hiding_puts_the_mask_embedding_in_place_before_positions():
    encoder = scramble(vit(learned_std=0.5)).eval()
    x = torch.randn(2, 16, 16)
    mask = torch.rand(2, 16) > 0.5
    by_hand = x.clone()
    by_hand[mask] = encoder.mask_embedding
    close(encoder.transform(x, mask)[0], encoder.transform(by_hand)[0])


def test_the_heads_are_those_of_the_paper():
    assert [tuple(p.shape) for p in regression_head(6).parameters()] == [(6, 6), (6,)]
    two = regression_head(6, layers=2)
    assert [tuple(p.shape) for p in two.parameters()] == [(12, 6), (12,), (6, 12), (6,)]
    x = torch.randn(3, 6)
    close(two(x), F.gelu(x @ two[0].weight.T + two[0].bias) @ two[2].weight.T + two[2].bias)


def test_the_classifier_reads_the_mean_of_the_patches_before_the_final_norm():
    encoder = scramble(vit())
    body = copy.deepcopy(encoder).eval()
    classifier = scramble(Classifier(encoder, 5)).eval()
    body.load_state_dict(classifier.encoder.state_dict(), strict=False)
    images = torch.randn(2, 3, 16, 16)
    mean = body(images)[1][-1].mean(1)
    expected = F.layer_norm(mean, (16,), classifier.norm.weight, classifier.norm.bias, 1e-6)
    close(classifier(images), expected @ classifier.out.weight.T + classifier.out.bias)


# ---- sequences with padding: what speech and text will need --------------------------------------------------------


class Frames(nn.Module):
    """A tiny embedder without prefix: (B, T, 3) -> (B, T, D), positions from a convolution over unpadded frames."""

    prefix = 0

    def __init__(self, dim):
        super().__init__()
        self.proj, self.conv = nn.Linear(3, dim), nn.Conv1d(dim, dim, 3, padding=1)

    def forward(self, frames, valid):
        return self.proj(frames), valid

    def place(self, x, valid):
        x = x if valid is None else x * valid[..., None]
        self.length = x.shape[1]
        return x + F.gelu(self.conv(x.transpose(1, 2)).transpose(1, 2)), None

    def distance(self, *_):
        t = torch.arange(self.length)
        return (t[:, None] - t[None]).abs()


def post_norm(target="ffn", depth=2, alpha=1.0):
    blocks = [Block(8, 2, 16, pre_norm=False, eps=1e-5, k_bias=True, target=target, alpha=alpha) for _ in range(depth)]
    return scramble(Encoder(Frames(8), blocks, nn.Identity(), 8)).eval()


LENGTHS = (9, 4, 1)  # of three utterances in a batch of nine frames
VALID = torch.arange(9)[None] < torch.tensor(LENGTHS)[:, None]


@pytest.mark.parametrize("window", [0, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_what_lies_in_the_padding_never_reaches_a_real_position(window, masked):
    encoder, frames = post_norm(), torch.randn(3, 9, 3)
    mask = VALID & (torch.rand(3, 9) > 0.5) if masked else None
    features, layers = encoder(frames, mask, VALID, window)
    changed = torch.where(VALID[..., None], frames, 100.0)
    other_features, other_layers = encoder(changed, mask, VALID, window)
    for ours, theirs in zip([features, *layers], [other_features, *other_layers], strict=True):
        assert torch.equal(ours[VALID], theirs[VALID]) and ours[VALID].isfinite().all()


@pytest.mark.parametrize("window", [0, 1])
def test_the_teacher_knows_what_is_padding(window):
    teacher, frames = Teacher(post_norm(), window=window), torch.randn(3, 9, 3)
    changed = torch.where(VALID[..., None], frames, 100.0)
    for ours, theirs in zip(teacher(frames, VALID), teacher(changed, VALID), strict=True):
        assert torch.equal(ours[VALID], theirs[VALID]) and ours[VALID].isfinite().all()


@pytest.mark.parametrize("window", [0, 2])
def test_a_padded_sequence_gives_what_it_gives_alone(window):
    encoder, frames = post_norm(alpha=1.4), torch.randn(3, 9, 3)
    features, layers = encoder(frames, None, VALID, window)
    for b, length in enumerate(LENGTHS):
        alone_features, alone_layers = encoder(frames[b : b + 1, :length], window=window)
        for ours, alone in zip([features, *layers], [alone_features, *alone_layers], strict=True):
            close(ours[b, :length], alone[0])


def test_the_student_trains_on_padded_sequences():
    student = Student(post_norm(), regression_head(8, layers=2)).train()
    mask = VALID & (torch.rand(3, 9) > 0.5)
    mask[:, 0] = True
    f = student(torch.randn(3, 9, 3), mask, VALID)
    assert f.shape == (mask.sum(), 8)
    f.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


# ---- the window of the teacher -------------------------------------------------------------------------------------


@pytest.mark.parametrize("window, depth", [(1, 1), (1, 2), (2, 1)])
def test_a_window_keeps_far_patches_out_of_a_target_and_near_ones_in(window, depth):
    """Through `depth` layers content travels window * depth patches, and not one further by way of the class token."""
    encoder = scramble(vit((24, 24), depth=depth))
    teacher = Teacher(encoder, window=window)
    images = torch.randn(1, 3, 24, 24)
    changed = images.clone()
    changed[:, :, :4, :4] += 3  # the patch in row 0, column 0
    moved = (teacher(images)[-1] != teacher(changed)[-1]).any(-1).view(6, 6)
    expected = torch.tensor([[max(row, column) <= window * depth for column in range(6)] for row in range(6)])
    assert torch.equal(moved, expected)


def test_the_student_is_never_limited_by_the_window():
    student = scramble(Student(vit((24, 24), depth=1), regression_head(16)))
    Teacher(student.encoder, window=1)
    images, mask = torch.randn(1, 3, 24, 24), torch.zeros(1, 36, dtype=torch.bool)
    mask[0, -1] = True
    changed = images.clone()
    changed[:, :, :4, :4] += 3
    assert not torch.equal(student(images, mask), student(changed, mask))


# ---- initial weights -----------------------------------------------------------------------------------------------


def test_initial_weights_are_those_of_the_recipe():
    encoder = vit(depth=4, dim=128, layer_scale=1e-4)
    for name, p in encoder.named_parameters():
        if name.endswith("scale1") or name.endswith("scale2"):
            assert (p == 1e-4).all(), name
        elif "norm" in name and name.endswith("weight"):
            assert (p == 1).all(), name
        elif "bias" in name or name == "embed.table":
            assert (p == 0).all(), name
        else:
            std = 0.02
            if name.endswith(("attn.out.weight", "fc2.weight")):
                std /= math.sqrt(2 * (1 + int(name.split(".")[1])))  # blocks.0 is block l = 1
            assert p.std().item() == pytest.approx(std, rel=0.3 if p.ndim == 1 else 0.05), name
            assert abs(p.mean().item()) < 4 * std / math.sqrt(p.numel()), name
    assert vit(dim=128, init_std=0.1).blocks[0].fc1.weight.std().item() == pytest.approx(0.1, rel=0.05)


def test_vision_has_biases_for_queries_and_values_but_not_for_keys():
    names = [n for n, _ in vit(depth=1).blocks.named_parameters() if "attn" in n]
    parts = ("q_bias", "v_bias", "qkv.weight", "out.weight", "out.bias")
    assert sorted(names) == sorted(f"0.attn.{part}" for part in parts)


def test_norms_have_the_eps_of_vision():
    assert {m.eps for m in vit().modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


# ---- the teacher ---------------------------------------------------------------------------------------------------


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_the_teacher_starts_as_an_equal_copy():
    encoder = scramble(vit())
    teacher = Teacher(encoder)
    before = weights(encoder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.encoder.state_dict().items())
    scramble(encoder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.encoder.state_dict().items()), "a copy"


def test_the_teacher_never_trains():
    encoder = vit(dropout=0.5, drop_path=0.5, attn_dropout=0.5).train()
    teacher = Teacher(encoder)
    both = nn.ModuleList([encoder, teacher]).train()
    assert encoder.training and not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(teacher(images)[-1], teacher(images)[-1])
    teacher.update(encoder, 0.5)
    assert not any(p.requires_grad for p in both[1].parameters())


def test_no_gradient_reaches_the_teacher():
    student = scramble(Student(vit(), regression_head(16)))
    teacher = Teacher(student.encoder)
    images, mask = torch.randn(2, 3, 16, 16), torch.ones(2, 16, dtype=torch.bool)
    layers = teacher(images.requires_grad_())
    assert not any(a.requires_grad for a in layers)
    (student(images, mask) - layers[-1][mask]).square().mean().backward()
    teacher.update(student.encoder, 0.9)
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_update_is_a_moving_average_in_float32(dtype):
    encoder = scramble(vit()).to(dtype)
    teacher = Teacher(encoder)
    expected = {name: tensor.double() for name, tensor in encoder.state_dict().items()}
    for tau in (0.9998, 0.5, 0.99, 0.0, 0.999):
        scramble(encoder)
        teacher.update(encoder, tau)
        theta = encoder.state_dict()
        expected = {name: tau * delta + (1 - tau) * theta[name].double() for name, delta in expected.items()}
    for name, tensor in teacher.encoder.state_dict().items():
        assert tensor.dtype == torch.float32
        close(tensor.double(), expected[name], rtol=1e-6, atol=1e-6)


def test_tau_0_copies_and_tau_1_stands_still():
    encoder = vit()
    teacher = Teacher(encoder)
    before = weights(teacher.encoder)
    scramble(encoder)
    for tau in (1.0, 1.5):
        teacher.update(encoder, tau)
        assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.encoder.state_dict().items())
    teacher.update(encoder, 0.0)
    assert all(torch.equal(tensor, encoder.state_dict()[name]) for name, tensor in teacher.encoder.state_dict().items())


@pytest.mark.parametrize("tau", [0.9, 1.0])
def test_shared_modules_follow_the_student_at_once(tau):
    encoder = post_norm()
    encoder.embedding = nn.Linear(2, 2)  # not shared, although its name begins like one that is
    teacher = Teacher(encoder, shared=("embed", "blocks.1.attn"))
    before, theta = weights(teacher.encoder), weights(scramble(encoder))
    teacher.update(encoder, tau)
    for name, tensor in teacher.encoder.state_dict().items():
        if name.startswith(("embed.", "blocks.1.attn.")):
            assert torch.equal(tensor, theta[name]), name
        else:
            close(tensor, tau * before[name] + (1 - tau) * theta[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_integer_and_boolean_buffers_are_copied_never_averaged(tau):
    encoder = post_norm()
    encoder.embed.register_buffer("count", torch.tensor([7, 100]))
    encoder.blocks[0].register_buffer("flags", torch.tensor([True, False]))
    teacher = Teacher(encoder)
    encoder.embed.count += 3
    encoder.blocks[0].flags.logical_not_()
    teacher.update(encoder, tau)
    assert teacher.encoder.embed.count.tolist() == [10, 103] and teacher.encoder.embed.count.dtype == torch.int64
    assert teacher.encoder.blocks[0].flags.tolist() == [False, True]


def test_the_relative_position_index_survives_updates():
    encoder = vit((8, 12))
    teacher = Teacher(encoder)
    for _ in range(3):
        teacher.update(scramble(encoder), 0.7)
    assert torch.equal(teacher.encoder.embed.index, relative_index(2, 3))


class Kernels(TorchDispatchMode):
    """Counts the operations that do work; state_dict()'s detach only makes views."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is not torch.ops.aten.detach:
            self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shared", [(), ("embed",)])
def test_an_update_is_a_handful_of_operations_whatever_the_depth(shared):
    counts = []
    for depth in (1, 8):
        encoder = vit(depth=depth)
        encoder.register_buffer("steps", torch.tensor(0))
        teacher = Teacher(encoder, shared)
        with Kernels() as kernels:
            teacher.update(encoder, 0.9)
        counts.append(sum(kernels.names.values()))
        assert counts[-1] <= 4, kernels.names
    assert counts[0] == counts[1]


# ---- speech --------------------------------------------------------------------------------------------------------


def wav2vec(depth=2, dim=16, channels=8, **changes):
    convs = tuple((channels, kernel, stride) for _, kernel, stride in CONVS)
    options = dict(dim=dim, depth=depth, heads=2, ffn=2 * dim, convs=convs, kernel=3, pos_depth=2, groups=4)
    return speech_encoder(**options | changes)


def test_there_are_as_many_frames_as_the_convolutions_leave():
    encoder = wav2vec()
    lengths = list(range(400, 2400)) + [16_000, 320_000, 3_800_000]
    expected = []
    for n in lengths:
        for kernel, stride in ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2)):
            n = math.floor((n - kernel) / stride + 1)
        expected.append(n)
    assert [encoder.embed.frames(n) for n in lengths] == encoder.embed.frames(torch.tensor(lengths)).tolist() == expected
    assert [encoder.embed.frames(n) for n in (399, 400, 719, 720, 16_000)] == [0, 1, 1, 2, 49], "25 ms, then 20 ms a frame"
    for n in (400, 719, 720, 721, 1039, 1040, 2047):
        assert encoder(torch.randn(2, n))[0].shape == (2, encoder.embed.frames(n), 16)


def test_a_frame_sees_400_samples_and_the_next_begins_320_later():
    embed = scramble(wav2vec()).embed
    for t in range(4):
        waves = torch.randn(1, 400 + 3 * 320, requires_grad=True)
        embed(waves)[0][0, t].square().sum().backward()
        seen = waves.grad[0].nonzero().flatten()
        assert (seen[0], seen[-1], len(seen)) == (320 * t, 320 * t + 399, 400)


def naive_convolve(conv, norm, x):
    """(B, N, C): one output frame at a time, then a layer norm over channels and GELU."""
    (kernel,), (stride,) = conv.kernel_size, conv.stride
    frames = [
        torch.einsum("bkc, ock -> bo", x[:, start : start + kernel], conv.weight)
        for start in range(0, x.shape[1] - kernel + 1, stride)
    ]
    y = torch.stack(frames, 1)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    return 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))


@pytest.mark.parametrize("matrices", [False, True], ids=["Conv1d", "matrices"])
@pytest.mark.parametrize("kernel, stride", [(10, 5), (3, 2), (2, 2), (5, 2), (4, 3), (1, 1), (3, 1)])
def test_both_ways_to_convolve_are_that_of_a_loop(kernel, stride, matrices, monkeypatch):
    """The way of a CPU in bfloat16 is taken in float32 here."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: matrices)
    for channels in (1, 4):
        conv, norm = nn.Conv1d(channels, 6, kernel, stride, bias=False), scramble(nn.LayerNorm(6))
        for n in range(kernel, kernel + 3 * stride + 1):
            x = torch.randn(2, n, channels)
            close(convolve(conv, norm, x), naive_convolve(conv, norm, x))


def test_both_ways_to_convolve_agree_in_bfloat16(monkeypatch):
    conv, norm, x = nn.Conv1d(8, 16, 3, 2, bias=False), scramble(nn.LayerNorm(16)), torch.randn(2, 51, 8)
    found = []
    for matrices in (True, False):
        with torch.autocast("cpu", torch.bfloat16), monkeypatch.context() as patch:
            patch.setattr(torch, "is_autocast_enabled", lambda device: matrices)
            y = convolve(conv, norm, x).float()
        y.square().sum().backward()
        found.append((y.detach(), conv.weight.grad))
        conv.weight.grad = None
    exact = naive_convolve(conv, norm, x)
    for ours, (y, gradient) in zip(found, reversed(found)):
        close(ours[0], exact, rtol=0, atol=0.05)
        close(ours[0], y, rtol=0, atol=0.05)
        close(ours[1], gradient, rtol=0.05, atol=0.02 * gradient.abs().max().item())


def test_speech_content_is_seven_convolutions_a_norm_and_a_projection():
    content, waves = scramble(wav2vec()).embed.content, torch.randn(2, 900)
    x = waves[..., None]
    for conv, norm in zip(content["convs"], content["norms"], strict=True):
        x = naive_convolve(conv, norm, x)
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    x = (x * content["norm"].weight + content["norm"].bias) @ content["proj"].weight.T + content["proj"].bias
    encoder = wav2vec()
    encoder.embed.content = content
    close(encoder.embed(waves)[0], x)


def naive_positions(embed, x):
    """x (T, D) plus its stacked convolutions, one frame and one channel at a time, then the layer norm."""

    def standard(y):
        return (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

    t, dim = x.shape
    y = x
    for conv in embed.positions:
        (kernel,), width = conv.kernel_size, dim // conv.groups
        before = F.pad(y, (0, 0, kernel // 2, kernel))
        y = torch.empty(t, dim)
        for i in range(t):
            for d in range(dim):
                group = slice(d // width * width, (d // width + 1) * width)
                y[i, d] = (before[i : i + kernel, group] * conv.weight[d].T).sum() + conv.bias[d]
        y = F.gelu(standard(y))
    return standard(x + y) * embed.norm.weight + embed.norm.bias


@pytest.mark.parametrize("kernel", [3, 4, 7])
@torch.no_grad()
def test_speech_positions_are_stacked_grouped_convolutions(kernel):
    embed = scramble(wav2vec(kernel=kernel)).embed
    x = torch.randn(2, 6, 16)
    close(embed.place(x)[0], torch.stack([naive_positions(embed, row) for row in x]))


SAMPLES = torch.tensor([2000, 1500, 400])  # 6, 4 and 1 frames
HEARD = torch.arange(6)[None] < torch.tensor([6, 4, 1])[:, None]


@torch.no_grad()
def test_a_padded_batch_of_speech_step_by_step():
    """Project, hide, zero padded frames once, positions, norm, blocks that attend to real frames; targets over all frames."""
    encoder = scramble(wav2vec()).eval()
    waves = torch.randn(3, 2000) * (torch.arange(2000) < SAMPLES[:, None])
    mask = HEARD & (torch.rand(3, 6) > 0.5)
    x = torch.zeros(3, 6, 16)
    for b, (n, t) in enumerate(zip(SAMPLES.tolist(), (6, 4, 1))):
        x[b, :t] = encoder.embed(waves[b : b + 1, :n])[0][0]  # each alone
    assert torch.equal(encoder.embed(waves, SAMPLES)[1], HEARD)
    close(encoder.embed(waves, SAMPLES)[0][HEARD], x[HEARD])

    for b, t in HEARD.logical_and(mask).nonzero().tolist():
        x[b, t] = encoder.mask_embedding
    x = torch.stack([naive_positions(encoder.embed, row) for row in x])
    bias = torch.zeros(3, 2, 6, 6).masked_fill(~HEARD[:, None, None], -math.inf)
    layers = []
    for block in encoder.blocks:
        layers.append(naive_block(block, x, bias)["ffn"])
        x = naive_block(block, x, bias)["block"]
    features, ours = encoder(waves, mask, SAMPLES)
    close(features, x)
    for a, expected in zip(ours, layers, strict=True):
        close(a, expected)
    y = sum((a - a.mean(1, keepdim=True)) / (a.var(1, correction=0, keepdim=True) + 1e-5).sqrt() for a in layers) / 2
    close(top_k_average(ours, 2, "instance"), y, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("pos_depth", [1, 3])
@torch.no_grad()
def test_padding_bleeds_through_all_position_convolutions_but_the_first(pos_depth):
    embed, x = scramble(wav2vec(pos_depth=pos_depth, kernel=5)).embed, torch.randn(1, 20, 16)
    alone, _ = embed.place(x[:, :14])
    padded, _ = embed.place(x, torch.arange(20)[None] < 14)
    reach = 2 * (pos_depth - 1)  # frames
    close(padded[:, : 14 - reach], alone[:, : 14 - reach])
    assert reach == 0 or (padded[:, 13] - alone[:, 13]).abs().max() > 1e-3


def test_the_student_hands_its_content_to_the_teacher_before_hiding():
    student = scramble(Student(wav2vec(), regression_head(16))).eval()
    teacher, waves, mask = Teacher(student.encoder), torch.randn(3, 2000), HEARD & (torch.rand(3, 6) > 0.3)
    mask[:, 0] = True
    f, x, valid = student(waves, mask, SAMPLES, content=True)
    assert torch.equal(f, student(waves, mask, SAMPLES)) and torch.equal(valid, HEARD)
    assert f.requires_grad and not x.requires_grad and torch.equal(x, student.encoder.embed(waves, SAMPLES)[0])
    for ours, alone in zip(teacher(x, valid, content=True), teacher(waves, SAMPLES), strict=True):
        assert torch.equal(ours, alone)


def test_the_window_limits_frames_to_their_neighbours():
    teacher = Teacher(scramble(wav2vec(depth=1, pos_depth=1)), window=2)
    x = torch.randn(1, 12, 16)
    changed = x.clone()
    changed[:, 0] += 3
    moved = (teacher(x, content=True)[0] != teacher(changed, content=True)[0]).any(-1)[0]
    assert moved.tolist() == [t <= 2 + 1 for t in range(12)], "the window, and one frame of the position convolution"


def test_layer_drop_skips_whole_layers_in_training_only(monkeypatch):
    encoder, waves = scramble(wav2vec(depth=4, layer_drop=0.3)), torch.randn(2, 2000)
    dice = []
    monkeypatch.setattr(torch, "rand", lambda *shape: torch.tensor(dice.pop(0)))
    encoder.eval()
    assert len(encoder(waves)[1]) == 4, "no dice were thrown"
    x, _ = encoder.embed.place(encoder.embed(waves)[0])
    expected = [x]
    for i in (1, 2):
        expected.append(encoder.blocks[i](expected[-1])[0])
    encoder.train()
    dice += [0.2, 0.3, 0.9, 0.0]
    features, layers = encoder(waves)
    assert torch.equal(features, expected[-1]) and len(layers) == 2
    features.square().sum().backward()
    for i, block in enumerate(encoder.blocks):
        gradients = [p.grad.abs().sum() for name, p in block.named_parameters() if "k_bias" not in name]
        assert all(g > 0 for g in gradients) if i in (1, 2) else not any(gradients), "zero, not None"


def test_layer_drop_drops_as_often_as_it_says():
    encoder, x = wav2vec(depth=20, dim=4, layer_drop=0.3, groups=1), torch.randn(1, 2, 4)
    counts = torch.tensor([20.0 - len(encoder.transform(x)[1]) for _ in range(30)])
    assert counts.mean() / 20 == pytest.approx(0.3, abs=0.08) and counts.std() > 0  # 4 standard errors


def test_initial_weights_of_speech_are_berts():
    encoder = wav2vec(dim=128, depth=3)
    for name, p in encoder.blocks.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert (p == 1).all(), name
        elif "bias" in name:
            assert (p == 0).all(), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.05) and abs(p.mean().item()) < 0.001, name
    assert {block.alpha for block in encoder.blocks} == {1.0} and isinstance(encoder.norm, nn.Identity)
    assert 0 <= encoder.mask_embedding.min() and encoder.mask_embedding.max() <= 1
    assert {m.eps for m in encoder.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    for conv in wav2vec(channels=64).embed.content["convs"]:
        assert conv.bias is None and conv.weight.std().item() == pytest.approx(math.sqrt(2 / conv.weight[0].numel()), rel=0.1)
    assert encoder.blocks[0].attn.k_bias is not None


@pytest.mark.parametrize("depth", [2, 12])
def test_initial_weights_of_deepnorm(depth):
    encoder, dim, gain = wav2vec(dim=64, depth=depth, ffn=256, deep_norm=True), 64, (8 * depth) ** -0.25
    for block in encoder.blocks:
        q, k, v = block.attn.qkv.weight.split(dim)
        assert block.alpha == pytest.approx((2 * depth) ** 0.25)
        small = v, block.attn.out.weight, block.fc1.weight, block.fc2.weight
        for weight, g in ((q, 1), (k, 1), *((weight, gain) for weight in small)):
            xavier = math.sqrt(2 / sum(weight.shape))
            assert weight.std().item() == pytest.approx(g * xavier, rel=0.06) and abs(weight.mean().item()) < 0.1 * xavier
        assert not any(p.any() for name, p in block.named_parameters() if "bias" in name)


def test_a_frozen_encoder_gets_no_gradient_and_its_layer_does():
    recogniser, waves = scramble(Recogniser(wav2vec(), 5)), torch.randn(3, 2000)
    for frozen in (True, False):
        recogniser.frozen = frozen
        logits, frames = recogniser(waves, SAMPLES)
        assert logits.shape == (3, 6, 5) and frames.tolist() == [6, 4, 1] and frames.dtype == torch.int64
        logits.square().sum().backward()
        assert all((p.grad is None) == frozen for n, p in recogniser.encoder.named_parameters() if n != "mask_embedding")
        assert recogniser.out.weight.grad.abs().sum() > 0
    assert recogniser(waves)[1].tolist() == [6, 6, 6], "without lengths all frames are real"
    with torch.no_grad():
        assert not recogniser(waves)[0].requires_grad


@torch.no_grad()
def test_the_recogniser_hides_frames_and_silences_channels():
    recogniser, waves = scramble(Recogniser(wav2vec(), 5)).eval(), torch.randn(3, 2000)
    mask, channels = torch.rand(3, 6) > 0.5, torch.rand(3, 16) > 0.7
    x, valid = recogniser.encoder.embed(waves, SAMPLES)
    for b, t in mask.nonzero().tolist():
        x[b, t] = recogniser.encoder.mask_embedding
    hidden = x.clone()
    for b, d in channels.nonzero().tolist():
        x[b, :, d] = 0
    for changes, content in (dict(mask=mask, channels=channels), x), (dict(mask=mask), hidden):
        expected = recogniser.out(recogniser.encoder.transform(content, None, valid)[0])
        close(recogniser(waves, SAMPLES, **changes)[0], expected)


def test_the_recognisers_dropout_acts_in_training_only():
    recogniser, waves = scramble(Recogniser(wav2vec(), 5, dropout=0.5)), torch.randn(1, 2000)
    assert not torch.equal(recogniser(waves)[0], recogniser(waves)[0])
    recogniser.eval()
    assert torch.equal(recogniser(waves)[0], recogniser(waves)[0])


def test_linear_softmax_weights_real_frames_by_their_own_probability():
    logits, frames = 4 * torch.randn(3, 6, 5), [6, 4, 1]
    pooled = linear_softmax(logits, torch.tensor(frames))
    for b in range(3):
        for c in range(5):
            p = [1 / (1 + math.exp(-v)) for v in logits[b, : frames[b], c].tolist()]
            assert pooled[b, c].item() == pytest.approx(sum(v * v for v in p) / sum(p), rel=1e-5)
    assert (linear_softmax(torch.full((1, 2, 3), -200.0), torch.tensor([2])) == 0).all(), "never 0 / 0"


# ---- text ----------------------------------------------------------------------------------------------------------


def roberta(**changes):
    options = dict(vocab=30, max_length=10, pad=1, dim=16, depth=2, heads=2, ffn=32)
    return text_encoder(**options | changes)


P = 1
IDS = torch.tensor([[0, 5, 6, 7, 8, 2], [0, 9, 10, 2, P, P], [P, P, 0, 11, 12, 2], [P, 0, P, 13, 2, P]])


@torch.no_grad()
@pytest.mark.parametrize("pad", [1, 3])
def test_tokens_have_positions_counted_over_what_is_no_padding_wherever_the_padding_stands(pad):
    embed = scramble(roberta(pad=pad)).embed
    ids = IDS.masked_fill(IDS == P, pad)
    x, valid = embed(ids)
    assert torch.equal(valid, ids != pad) and embed.positions.weight.shape == (10 + pad + 1, 16)
    placed, bias = embed.place(x, valid)
    assert bias is None
    for row, ours in zip(ids.tolist(), placed):
        count = 0
        for token, vector in zip(row, ours):
            if token == pad:
                assert not vector.any(), "padding is nothing"
                continue
            y = embed.tokens.weight[token] + embed.positions.weight[pad + 1 + count]
            y = (y - y.mean()) / (y.var(correction=0) + 1e-5).sqrt()
            close(vector, y * embed.norm.weight + embed.norm.bias)
            count += 1


def test_a_text_may_be_as_long_as_there_are_positions_and_no_longer():
    encoder = roberta(max_length=6)
    assert encoder(IDS)[0].shape == (4, 6, 16)
    with pytest.raises(ValueError, match="7 tokens.*for 6"):
        encoder(F.pad(IDS, (0, 1), value=P))


@torch.no_grad()
@pytest.mark.parametrize("window", [0, 2])
def test_a_padded_text_gives_what_it_gives_alone(window):
    encoder = scramble(roberta()).eval()
    features, layers = encoder(IDS, window=window)
    for b in range(3 if window else 4):  # a window counts padding within a text
        real = IDS[b] != P
        alone_features, alone_layers = encoder(IDS[b : b + 1, real], window=window)
        for ours, alone in zip([features, *layers], [alone_features, *alone_layers], strict=True):
            close(ours[b, real], alone[0])


def test_initial_weights_of_text_are_berts():
    encoder = roberta(vocab=300, max_length=200, dim=128, ffn=512)
    for name, p in encoder.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert (p == 1).all(), name
        elif "bias" in name:
            assert (p == 0).all(), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.05) and abs(p.mean().item()) < 0.001, name
    for table in (encoder.embed.tokens, encoder.embed.positions):
        assert not table.weight[1].any() and table.weight[0].any(), "padding alone is zero"
    assert {m.eps for m in encoder.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert encoder.mask_embedding is None and isinstance(encoder.norm, nn.Identity)


def test_padding_never_learns():
    encoder = roberta()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1)
    encoder(IDS)[0].square().sum().backward()
    optimizer.step()
    assert not encoder.embed.tokens.weight[1].any() and not encoder.embed.positions.weight[1].any()


@torch.no_grad()
@pytest.mark.parametrize("layers, widths", [(1, [8, 8]), (2, [8, 16, 8]), (3, [8, 16, 16, 8])])
def test_regression_heads_are_wide_layers_with_gelu_between(layers, widths):
    head, x = scramble(regression_head(8, layers)), torch.randn(5, 8)
    linears = [m for m in head.modules() if isinstance(m, nn.Linear)]
    assert [m.in_features for m in linears] + [8] == widths and [8] + [m.out_features for m in linears] == widths
    y = x
    for i, linear in enumerate(linears):
        y = y if i == 0 else 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        y = y @ linear.weight.T + linear.bias
    close(head(x), y)
