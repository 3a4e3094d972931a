"""model.py against naive re-computations; test_golden.py compares whole steps with the released numbers."""

import math
from itertools import product

import pytest
import torch
import torch.nn as nn

import model
from model import Block, Encoder, PatchEmbed, Student, Teacher, WaveEmbed

CONVS = ((10, 5),) + 4 * ((3, 2),) + 2 * ((2, 2),)  # kernel, stride


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def vit(grid=(4, 4), dim=16, depth=2, learned_std=0.0, tables=0, **options):
    embed = PatchEmbed(grid, 4, dim, 2, not learned_std, learned_std, tables)
    options = dict(pre_norm=True, eps=1e-6, heads=2, ffn=2 * dim, target="block") | options
    return Encoder(embed, dim, depth, **options)


def wav2vec(dim=16, depth=2, kernel=3, **options):
    embed = WaveEmbed([(8, *conv) for conv in CONVS], dim, kernel, 2, 4, 0.0, 1e-5)
    options = dict(pre_norm=False, eps=1e-5, heads=2, ffn=2 * dim, target="ffn") | options
    return Encoder(embed, dim, depth, **options)


@torch.no_grad()
def scramble(module):
    """Far from the initial values, so that no zero bias, unit gain or empty table hides a mistake."""
    for p in module.parameters():
        p.add_(0.3 * torch.randn_like(p))
    return module


def close(ours, expected, **tolerance):
    torch.testing.assert_close(ours, expected, **{"rtol": 1e-4, "atol": 2e-5} | tolerance)


# ---- attention and blocks --------------------------------------------------------------------------------


def naive_attention(attn, x, bias):
    """One query of one head at a time, the softmax written out."""
    size, out = x.shape[-1] // attn.heads, torch.zeros_like(x)
    q, k, v = (x @ weight.T for weight in attn.qkv.weight.chunk(3))
    q, v = q + attn.q_bias, v + attn.v_bias
    k = k if attn.k_bias is None else k + attn.k_bias
    for b, h, t in product(range(x.shape[0]), range(attn.heads), range(x.shape[1])):
        part = slice(h * size, (h + 1) * size)
        weights = (k[b, :, part] @ q[b, t, part] / math.sqrt(size) + bias[b, h, t]).exp()
        out[b, t, part] = weights / weights.sum() @ v[b, :, part]
    return out @ attn.out.weight.T + attn.out.bias


def naive_norm(layer, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


@torch.no_grad()
def naive_block(block, x, bias):
    """All that may be a target; "block" is the block's output."""

    def ffn(x):
        hidden = x @ block.fc1.weight.T + block.fc1.bias
        return 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))) @ block.fc2.weight.T + block.fc2.bias

    if block.pre_norm:
        gain1, gain2 = (1 if gain is None else gain for gain in (block.scale1, block.scale2))
        attention = gain1 * naive_attention(block.attn, naive_norm(block.norm1, x), bias)
        f = gain2 * ffn(naive_norm(block.norm2, x + attention))
        out = residual = x + attention + f
    else:
        attention = naive_attention(block.attn, x, bias)
        x = naive_norm(block.norm1, block.alpha * x + attention)
        f = ffn(x)
        residual = block.alpha * x + f
        out = naive_norm(block.norm2, residual)
    return {"block": out, "ffn": f, "ffn_residual": residual, "attention": attention}


def small_block(target="block", pre_norm=True, alpha=1.0, drop_path=0.0, **options):
    options |= dict(pre_norm=pre_norm, eps=1e-3, target=target, drop_path=drop_path, alpha=alpha)
    return scramble(Block(8, heads=2, ffn=16, **options))


@pytest.mark.parametrize("target", ["block", "ffn", "ffn_residual", "attention"])
@pytest.mark.parametrize("pre_norm, scale, alpha", [(1, 0.0, 1), (1, 0.3, 1), (0, 0.0, 1), (0, 0.0, 1.7)])
def test_a_block_and_its_four_targets(pre_norm, scale, alpha, target):
    block, x = small_block(target, pre_norm, alpha, layer_scale=scale), torch.randn(2, 5, 8)
    for bias in (torch.randn(2, 2, 5, 5), None):
        expected = naive_block(block, x, torch.zeros(2, 2, 5, 5) if bias is None else bias)
        out, a = block(x, bias)
        close(out, expected["block"])
        close(a, expected[target])


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("place", range(3), ids=["branch", "attention", "ffn"])
def test_dropout_acts_at_three_places_in_training_only(place, pre_norm):
    block = small_block(pre_norm=pre_norm, dropout=[0.5 if i == place else 0 for i in range(3)])
    x = torch.randn(2, 5, 8)
    assert not torch.equal(block(x)[0], block(x)[0])
    assert torch.equal(block.eval()(x)[0], block(x)[0])


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    block, y = small_block(drop_path=0.3), torch.ones(20_000, 2, 8)
    dropped = block.branch(y, None)
    kept = dropped[:, :1, :1] > 0
    close(dropped, torch.where(kept, 1 / 0.7, 0.0).expand_as(y))
    assert dropped.mean().item() == pytest.approx(1, abs=4 * math.sqrt(0.3 / 0.7 / 20_000))
    assert torch.equal(block.eval().branch(y, None), y)
    x, block.train().drop_path = torch.randn(8, 5, 8), 0.99
    assert (block(x)[0] == x).flatten(1).all(1).any(), "both branches of a sample"
    rates = [block.drop_path for block in vit(depth=5, drop_path=0.2).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize("window, padded", [(0, True), (1, False), (1, True)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("prefix, grid", [(0, (6,)), (1, (2, 3))])
def test_attention_mask(prefix, grid, biased, window, padded):
    t, width = prefix + 6, grid[-1]
    bias = torch.randn(1, 3, t, t) if biased else None
    valid = torch.arange(6) < torch.tensor([[6], [3]]) if padded else None
    near = model.neighbours(grid, window, "cpu") if window else None
    mask = model.attention_mask(bias, valid, near, prefix).expand(2, 3, t, t)
    for b, query, key in product(range(2), range(t), range(t)):
        q, k = query - prefix, key - prefix
        allowed = k < 0 or not padded or k < (6, 3)[b]
        if window and q >= 0:
            apart = max(abs(q // width - k // width), abs(q % width - k % width))
            allowed = allowed and k >= 0 and apart <= window
        yes, no = (bias[0, 1, query, key], -math.inf) if biased else (True, False)
        assert mask[b, 1, query, key] == (yes if allowed else no)


# ---- images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width, tables", [(2, 5, 0), (3, 3, 2), (4, 1, 0)])
def test_blocks_share_a_table_of_biases_or_have_one_each(height, width, tables):
    encoder, seen = scramble(vit((height, width), tables=tables)), []
    for block in encoder.blocks:
        block.attn.register_forward_pre_hook(lambda module, args: seen.append(args[1][0]))  # (H, T, T)
    encoder(torch.randn(1, 3, 4 * height, 4 * width))
    for bias, table in zip(seen, encoder.embed.table if tables else 2 * [encoder.embed.table], strict=True):
        for i, j in product(range(height * width), repeat=2):
            down, right = i // width - j // width, i % width - j % width
            row = (down + height - 1) * (2 * width - 1) + right + width - 1
            assert torch.equal(bias[:, 1 + i, 1 + j], table[row])
        assert (bias[:, 0, 1:] == table[-3][:, None]).all() and (bias[:, 1:, 0] == table[-2][:, None]).all()
        assert torch.equal(bias[:, 0, 0], table[-1])


@torch.no_grad()
def test_mask_embedding_then_learned_positions_then_the_class_token():
    encoder, inputs, x = scramble(vit(learned_std=0.5)), [], torch.randn(2, 16, 16)
    encoder.blocks[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    mask = torch.rand(2, 16) > 0.5
    encoder.transform(x, mask)
    x[mask] = encoder.mask_embedding
    close(inputs[0][:, 1:], x + encoder.embed.learned)
    close(inputs[0][:, 0], encoder.embed.cls.expand(2, -1))


def test_the_student_predicts_the_masked_positions_and_cannot_see_them():
    student = scramble(Student(vit(), nn.Linear(16, 16)))
    images, mask = torch.randn(3, 3, 16, 16), torch.rand(3, 16) > 0.6
    f, x, valid = student(images, mask)
    features, _ = student.encoder(images, mask)
    close(f, torch.stack([student.head(features[b, 1 + t]) for b, t in mask.nonzero().tolist()]))
    assert torch.equal(x, student.encoder.embed(images)[0]) and not x.requires_grad and valid is None
    pixels = mask.view(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.equal(student(torch.where(pixels, 7.0, images), mask)[0], f)
    assert (student(torch.where(pixels, images, 7.0), mask)[0] - f).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("window, depth", [(1, 1), (1, 2), (2, 1)])
def test_a_window_limits_the_teacher_and_never_the_student(window, depth):
    """Content travels window * depth patches, and no further by way of the class token."""
    student = scramble(Student(vit((6, 6), depth=depth), nn.Linear(16, 16)))
    teacher, images = Teacher(student.encoder, window=window), torch.randn(1, 3, 24, 24)
    changed = images.clone()
    changed[:, :, :4, :4] += 3  # the first patch
    moved = (teacher(images)[-1] != teacher(changed)[-1]).any(-1)[0]
    assert moved.tolist() == [
        max(row, column) <= window * depth for row, column in product(range(6), repeat=2)
    ]
    mask = torch.arange(36)[None] == 35
    assert not torch.equal(student(images, mask)[0], student(changed, mask)[0])


# ---- speech ---------------------------------------------------------------------------------------------


def test_frames_are_400_samples_long_and_320_apart():
    embed, waves = scramble(wav2vec()).embed, torch.randn(1, 1360, requires_grad=True)
    for n in [*range(400, 2400, 7), 16_000, 3_800_000]:
        expected = n
        for kernel, stride in CONVS:
            expected = math.floor((expected - kernel) / stride + 1)
        assert embed.frames(n) == embed.frames(torch.tensor(n)).item() == expected
    for t in range(embed.frames(1360)):
        (gradient,) = torch.autograd.grad(embed(waves)[0][0, t].square().sum(), waves)
        assert gradient[0].nonzero().flatten().tolist() == list(range(320 * t, 320 * t + 400))


@pytest.mark.parametrize("kernel", [3, 4])
@torch.no_grad()
def test_speech_positions_are_grouped_convolutions(kernel):
    embed, x = scramble(wav2vec(kernel=kernel)).embed, torch.randn(6, 16)
    y, plain = x, nn.LayerNorm(16)
    for conv in embed.positions:
        padded, y = nn.functional.pad(y, (0, 0, kernel // 2, kernel)), torch.empty(6, 16)
        for t, d in product(range(6), range(16)):
            group = slice(d // 4 * 4, d // 4 * 4 + 4)
            y[t, d] = (padded[t : t + kernel, group] * conv.weight[d].T).sum() + conv.bias[d]
        y = nn.functional.gelu(naive_norm(plain, y))
    close(embed.add_positions(x[None])[0][0], naive_norm(embed.norm, x + y))


def test_the_speech_teacher_goes_on_from_the_students_content():
    student, samples = scramble(Student(wav2vec(), nn.Linear(16, 16))), torch.tensor([2000, 1000, 400])
    teacher, waves, mask = Teacher(student.encoder, window=1), torch.randn(3, 2000), torch.rand(3, 6) > 0.5
    _, x, valid = student(waves, mask, samples)
    assert valid.sum(1).tolist() == [6, 2, 1]
    for a, expected in zip(teacher.from_embedded(x, valid), teacher(waves, samples), strict=True):
        assert torch.equal(a, expected) and a.isfinite().all(), "also where no key is allowed"


def test_layer_drop_skips_whole_layers_in_training_only(monkeypatch):
    encoder, waves = scramble(wav2vec(depth=4, layer_drop=0.3)), torch.randn(2, 2000)
    x, _ = encoder.embed.add_positions(encoder.embed(waves)[0])
    dice = [0.2, 0.3, 0.9, 0.0]
    monkeypatch.setattr(torch, "rand", lambda *shape: torch.tensor(dice.pop(0)))
    features, layers = encoder(waves)
    assert torch.equal(features, encoder.blocks[2](encoder.blocks[1](x)[0])[0]) and len(layers) == 2
    features.square().sum().backward()
    for l, block in enumerate(encoder.blocks):
        gradients = [p.grad for name, p in block.named_parameters() if name != "attn.k_bias"]
        assert all(g.any() == (l in (1, 2)) for g in gradients), "zeros, not None: DDP waits for all"
    assert len(encoder.eval()(waves)[1]) == 4, "no dice are left"


# ---- initial weights -------------------------------------------------------------------------------------


def check_init(module, std_of):
    """Gains 1, biases and tables 0, all else random around 0 with std_of(name)."""
    for name, p in module.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert (p == 1).all(), name
        elif "bias" in name or name.endswith("table"):
            assert (p == 0).all(), name
        elif "scale" not in name:
            std = std_of(name)
            assert p.std().item() == pytest.approx(std, rel=0.3 if p.ndim == 1 else 0.05), name
            assert abs(p.mean().item()) < 4 * std / math.sqrt(p.numel()), name


def test_initial_weights_of_vision():
    encoder = vit(depth=4, dim=128, layer_scale=1e-4)
    model.init_vision(encoder)
    for l, block in enumerate(encoder.blocks, start=1):
        for linear in (block.attn.out, block.fc2):
            linear.weight.data *= math.sqrt(2 * l)  # now as all others
        assert (block.scale1 == 1e-4).all() and (block.scale2 == 1e-4).all() and block.attn.k_bias is None
    check_init(encoder, lambda name: 0.02)


def test_initial_weights_of_speech_and_text():
    encoder = wav2vec(dim=128)
    model.init_post_norm(encoder, 0.03)
    check_init(encoder.blocks, lambda name: 0.03)
    model.init_post_norm(encoder, 0)
    check_init(encoder.blocks, lambda name: (256 if "fc2" in name else 128) ** -0.5)


def test_initial_weights_and_gain_of_deepnorm():
    encoder, beta = wav2vec(dim=64, depth=5, ffn=256, deep_norm=True), (8 * 5) ** -0.25
    model.init_post_norm(encoder, deep_norm=True)
    for block in encoder.blocks:
        q, k, v = block.attn.qkv.weight.chunk(3)
        small = (v, block.attn.out.weight, block.fc1.weight, block.fc2.weight)
        for weight, gain in ((q, 1), (k, 1), *((weight, beta) for weight in small)):
            assert weight.std().item() == pytest.approx(gain * math.sqrt(2 / sum(weight.shape)), rel=0.06)
        assert block.alpha == pytest.approx((2 * 5) ** 0.25)


# ---- the teacher -----------------------------------------------------------------------------------------


def test_the_teacher_is_a_copy_that_never_trains():
    student = scramble(Student(vit(drop_path=0.5, dropout=(0.5, 0.5, 0.5)), nn.Linear(16, 16)))
    teacher, images = Teacher(student.encoder), torch.randn(2, 3, 16, 16, requires_grad=True)
    nn.ModuleList([student, teacher]).train()
    layers = teacher(images)
    assert not any(tensor.requires_grad for tensor in [*layers, *teacher.parameters()])
    scramble(student)
    teacher.update(student.encoder, 1.5)
    assert student.training and torch.equal(layers[-1], teacher(images)[-1]), "no dropout, no update"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_closed_form_of_the_moving_average(dtype):
    """delta_n = tau^n delta_0 + (1 - tau) sum_i tau^(n - i) theta_i, in float32; shared modules: theta_n."""
    encoder, tau, n = scramble(wav2vec()).to(dtype), 0.9, 6
    encoder.embedding = nn.Linear(2, 2)  # not shared, although its name begins like "embed"
    encoder.blocks[0].register_buffer("count", torch.tensor([7, 100]))
    teacher = Teacher(encoder, ("embed", "blocks.1.attn"))
    expected = {name: tau**n * delta.double() for name, delta in encoder.state_dict().items()}
    for i in range(1, n + 1):
        scramble(encoder).blocks[0].count += 3
        teacher.update(encoder, tau)
        for name, theta in encoder.state_dict().items():
            expected[name] += (1 - tau) * tau ** (n - i) * theta.double()
    for name, tensor in teacher.encoder.state_dict().items():
        if name.startswith(("embed.", "blocks.1.attn.")) or name.endswith("count"):
            assert torch.equal(tensor, encoder.state_dict()[name].to(tensor.dtype)), name
        else:
            close(tensor, expected[name].float(), rtol=1e-6, atol=1e-6)
    assert teacher.encoder.blocks[0].count.tolist() == [25, 118]
