"""data2vec 2.0's networks: what is hidden stays hidden, whose weights the teacher has, what is drawn anew.

Each test but the first fails if a trap is stepped into that moves the loss little or not at all.
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model2
import train_speech
import train_text
import train_vision
from model import Teacher
from targets import regression_loss, top_k_average

SIZES = dict(dim=16, depth=3, heads=4, ffn=32, top_k=2, masks=3, decoder_depth=2, decoder_width=16)
SIZES |= dict(decoder_kernel=3, decoder_groups=4)
VISION = SIZES | dict(image_size=24, patch=4, mask_ratio=0.8, mask_adjust=0.07, mask_block=2, target="ffn")
SPEECH = SIZES | dict(channels=8, pos_width=15, pos_groups=4, mask_p=0.5, mask_adjust=0.05, mask_span=5)
TEXT = SIZES | dict(max_tokens=24, mask_p=0.48)


def made(kind, **more):
    """-> Config, student of random weights with nothing at its initial value, input, masks (B * M, T)."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    if kind == "vision":
        cfg, x = train_vision.Config(**VISION | more), torch.randn(2, 3, 24, 24)
        student, mask = train_vision.build(cfg), [train_vision.draw_mask(cfg, rng) for _ in range(2)]
        mask = torch.stack(mask).flatten(0, 1)
    elif kind == "speech":
        cfg, x = train_speech.Config(**SPEECH | more), torch.randn(2, 8000)
        student, mask = train_speech.build(cfg), train_speech.draw_mask(cfg, torch.tensor([8000, 8000]), rng)
    else:
        cfg, x = train_text.Config(**TEXT | more), torch.randint(3, 40, (2, 24))
        student = train_text.build(cfg, 40)
        mask = torch.cat([train_text.draw_mask(cfg, None, ids.numpy(), rng)[1] for ids in x])
    for p in student.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return cfg, student.eval(), x, mask


kinds = pytest.mark.parametrize("kind", ["vision", "speech", "text"])


@kinds
def test_shapes_and_equal_counts(kind):
    cfg, student, x, mask = made(kind)
    f, content, _ = student(x, mask)
    assert len(mask) == 2 * cfg.masks and len(set(mask.sum(1).tolist())) == 1
    assert f.shape == (int(mask.sum()), 16) and content.shape == (2, mask.shape[1], 16)
    assert (student.cls is not None) == (kind == "vision")


@kinds
@torch.no_grad()
def test_the_student_learns_nothing_of_hidden_positions(kind):
    _, student, x, mask = made(kind)
    content, _ = student.encoder.embed(x)
    other = content.repeat_interleave(3, 0)
    other[mask] = torch.randn(int(mask.sum()), 16)
    for row in range(len(mask)):
        args = mask[row : row + 1]
        seen, _ = student.encoder.transform(content[row // 3][None], args)
        torch.testing.assert_close(student.encoder.transform(other[row][None], args)[0], seen)


@kinds
def test_the_masks_of_a_sample_differ_and_so_does_their_noise(kind):
    """It is that of the masks: the same for a sample on its own."""
    _, student, x, mask = made(kind)
    assert len({tuple(row.tolist()) for row in mask}) == len(mask)
    rows = torch.cat([model2.noise_of(masks, 2, 16) for masks in (mask, mask.flip(1))])
    assert rows.shape == (12, mask.shape[1], 16) and len(rows.flatten().unique()) > 0.99 * rows.numel()
    assert abs(rows.mean()) < 0.05 and abs(rows.std() - 1) < 0.05
    assert torch.equal(model2.noise_of(mask[3:], 1, 16), rows[3:6])
    both, alone = student(x, mask)[0], student(x[1:], mask[3:])[0]
    torch.testing.assert_close(both[mask[:3].sum() :], alone)


@kinds
def test_prenet_blocks_give_no_target(kind):
    cfg, student, x, _ = made(kind, prenet=2)
    assert len(student.encoder.context["blocks"]) == 2 and len(Teacher(student.encoder)(x)) == cfg.depth


@kinds
def test_the_context_is_normalised_even_without_prenet_blocks(kind):
    _, student, _, _ = made(kind)
    assert isinstance(student.encoder.context["norm"], torch.nn.LayerNorm) == (kind != "text")


def test_distances_are_of_the_original_steps():
    _, student, _, _ = made("speech")
    embed = student.encoder.embed
    bias = embed.distance_bias(torch.tensor([[0, 5, 6, 20]]))
    expected = -embed.slopes * embed.gain.clamp_min(0)
    torch.testing.assert_close(bias[0, :, 0, 3], 20 * expected)
    torch.testing.assert_close(bias[0, :, 2, 1], 1 * expected)
    torch.testing.assert_close(torch.tensor(model2.slopes(3)), 2.0 ** torch.tensor([-4.0, -8.0, -2.0]))
    assert model2.slopes(12)[8:] == [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]


def test_columns_come_before_rows_in_the_positions():
    table = model2.sin_cos((3, 5), 16).view(3, 5, 16)
    assert (table[:, :, :8] == table[:1, :, :8]).all() and (table[:, :, 8:] == table[:, :1, 8:]).all()
    torch.testing.assert_close(
        table[1, 2, [0, 4, 8]],
        torch.tensor([2.0, 2.0, 1.0]).sin().where(torch.tensor([True, False, True]), torch.tensor(2.0).cos()),
    )


@pytest.mark.parametrize(
    "kind, own", [("vision", "embed.proj"), ("speech", "embed.gain"), ("text", "blocks")]
)
def test_what_the_teacher_averages(kind, own):
    cfg, student, x, mask = made(kind)
    shared = {"vision": (), "speech": ("embed.content",), "text": ("embed", "context")}[kind]
    teacher, before = Teacher(student.encoder, shared), copy.deepcopy(student.encoder.state_dict())
    for p in student.parameters():
        p.data += 1
    teacher.update(student.encoder, 0.75)
    for name, value in teacher.encoder.state_dict().items():
        moved = 1.0 if name.startswith(shared or "-") else 0.25
        torch.testing.assert_close(value, before[name] + moved)
    assert any(name.startswith(own) and not name.startswith(shared or "-") for name in before)


def test_targets_are_normalised_over_all_positions():
    cfg, student, x, mask = made("speech")
    layers = Teacher(student.encoder)(x)
    y = top_k_average(layers, 1, "instance")
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        layers[-1],
        y * layers[-1].std(1, correction=0)[:, None] + layers[-1].mean(1)[:, None],
        atol=1e-3,
        rtol=0,
    )


def test_decoder_norms_and_residuals():
    torch.manual_seed(0)
    for width, residuals in ((16, (True, True)), (8, (False, True))):
        decoder, x = model2.Decoder(16, width, 2, 3, 4), 0.01 * torch.randn(2, 9, 16)
        y = x
        for conv, residual in zip(decoder.convs, residuals):
            z = F.gelu(F.layer_norm(conv(y.mT).mT, (width,), eps=1e-5))
            y = y + z if residual else z
        torch.testing.assert_close(decoder(x), decoder.head(y), atol=1e-5, rtol=1e-5)


def test_the_class_term_is_a_sum_over_the_views_of_one_released_gpu():
    weight = train_vision.Config().class_weight
    q, t = torch.randn(16 * 16, 8), torch.randn(16 * 16, 8)
    summed = 0.01 * regression_loss(q, t, 0.0, 8**-0.5)
    torch.testing.assert_close(weight * regression_loss(q, t, 0.0, 8**-0.5) / len(q), summed)
