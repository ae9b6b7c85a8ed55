"""The VQ autoencoder and its codebook: nearest codes, gradients, averages, dead codes. No trained weights."""

import pytest
import torch

from ornstein.codecs import VectorQuantiser, VQAutoencoder


def quantiser(**options: object) -> VectorQuantiser:
    torch.manual_seed(0)
    return VectorQuantiser(8, 3, **options)


def small(**options: object) -> VQAutoencoder:
    torch.manual_seed(0)
    settings = {"channels": 3, "codes": 8, "width": 8, "multipliers": (1, 2), "groups": 4} | options
    return VQAutoencoder(1, 16, **settings)


def test_each_vector_gets_its_nearest_code() -> None:
    book = quantiser()
    with torch.no_grad():
        book.codebook.normal_()
    h = torch.randn(2, 3, 4, 5)
    found = book(h)
    flat = h.movedim(1, -1).reshape(-1, 3).double()
    nearest = torch.cdist(flat, book.codebook.double()).argmin(1).reshape(2, 4, 5)
    assert found.indices.equal(nearest)
    assert found.codes.equal(book.codebook[nearest].movedim(-1, 1))
    # h + (e - h) is e up to a rounding.
    torch.testing.assert_close(found.straight, found.codes, rtol=0, atol=1e-6)


def test_the_gradient_passes_straight_through_and_the_codebook_has_its_own() -> None:
    book = quantiser()
    h = torch.randn(2, 3, 4, 4, requires_grad=True)
    found = book(h)
    (straight,) = torch.autograd.grad((found.straight * 3).sum(), h, retain_graph=True)
    assert straight.equal(torch.full_like(h, 3.0))
    (own,) = torch.autograd.grad((found.codes - h.detach()).square().sum(), book.codebook)
    used = torch.zeros(8, dtype=torch.bool)
    used[found.indices.unique()] = True
    assert own.abs().sum(1).gt(0).equal(used)


def test_perplexity_in_closed_form() -> None:
    book = quantiser()
    assert book.perplexity(torch.zeros(2, 3, 3, dtype=torch.int64)).item() == pytest.approx(1.0)
    assert book.perplexity(torch.arange(8).reshape(2, 2, 2)).item() == pytest.approx(8.0)
    # One half, one quarter, one quarter: 2 ** 1.5.
    assert book.perplexity(torch.tensor([[[0, 0], [1, 2]]])).item() == pytest.approx(2**1.5)


def test_the_averages_tend_to_the_mean_of_what_falls_to_a_code() -> None:
    book = quantiser(update="ema", decay=0.5, revive_below=0.0)
    assert not any(p.requires_grad for p in book.parameters())
    centres = torch.tensor([[2.0, 0.0, 0.0], [0.0, -2.0, 0.0]])
    with torch.no_grad():
        book.codebook[:2].copy_(centres + 0.3)
        book.sums[:2].copy_(book.codebook[:2] / 8)
    h = centres.repeat(8, 1).reshape(1, 4, 4, 3).movedim(-1, 1)
    for _ in range(40):
        book.learn(h, book.indices(h))
    # What it started from has been halved forty times.
    torch.testing.assert_close(book.codebook[:2], centres, rtol=0, atol=1e-5)
    torch.testing.assert_close(book.share[:2], torch.tensor([0.5, 0.5]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_dead_codes_move_to_vectors_of_the_batch_and_live_ones_stay(update: str) -> None:
    book = quantiser(update=update, decay=0.0, revive_below=0.5)
    with torch.no_grad():
        book.codebook.copy_(torch.arange(24.0).reshape(8, 3) * 100)
    h = torch.zeros(1, 3, 2, 2) + 0.25
    before = book.codebook.detach().clone()
    book.learn(h, book.indices(h), torch.Generator().manual_seed(0))
    moved = book.codebook.detach()[1:]
    assert moved.equal(torch.full_like(moved, 0.25)), "all that the batch holds"
    assert moved.shape == before[1:].shape and not moved.equal(before[1:])
    if update == "gradient":
        assert book.codebook[0].equal(before[0])
    assert book.share[1:].equal(torch.full((7,), 1 / 8)), "with an equal share again"


def test_nothing_is_learned_in_evaluation() -> None:
    codec = small().eval()
    state = {name: value.clone() for name, value in codec.state_dict().items()}
    codec.code(torch.randn(4, 1, 16, 16))
    assert all(value.equal(state[name]) for name, value in codec.state_dict().items())
    codec.train().code(torch.randn(4, 1, 16, 16))
    assert not codec.quantiser.share.equal(state["quantiser.share"])


def test_terms_are_one_number_with_two_gradients() -> None:
    codec = small()
    coded = codec.code(torch.randn(4, 1, 16, 16))
    assert set(coded.terms) == {"commitment", "codebook"} and set(coded.facts) == {"perplexity"}
    torch.testing.assert_close(coded.terms["commitment"], coded.terms["codebook"])
    coded.terms["commitment"].mean().backward()
    assert codec.quantiser.codebook.grad is None and codec.quant.weight.grad is not None
    codec.zero_grad()
    codec.code(torch.randn(4, 1, 16, 16)).terms["codebook"].mean().backward()
    assert codec.quantiser.codebook.grad is not None and codec.quant.weight.grad is None
    assert set(small(update="ema").code(torch.randn(4, 1, 16, 16)).terms) == {"commitment"}


def test_latents_come_before_the_codes_unless_asked() -> None:
    x = torch.randn(2, 1, 16, 16)
    codec, quantised = small().eval(), small(quantise_latents=True).eval()
    assert codec.encode(x).equal(codec.quant(codec.encoder(x)))
    codes = codec.quantiser(codec.encode(x)).codes
    torch.testing.assert_close(quantised.encode(x), codes, rtol=0, atol=1e-6)
    # What is decoded is quantised first, so both are the same image.
    torch.testing.assert_close(codec.decode(codec.encode(x)), quantised.decode(quantised.encode(x)), rtol=0, atol=1e-5)
    assert VQAutoencoder(**codec.config).config == codec.config


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"codes": 1}, "codes=1 of at least 2"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"revive_below": 1.5}, "revive_below=1.5"),
        ({"update": "sgd"}, "update=sgd is unknown: a codebook learns by gradient or ema"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        small(**options)


def test_the_fingerprint_knows_the_codes_and_not_the_averages() -> None:
    codec = small(update="ema").eval()
    own = codec.fingerprint
    codec.quantiser.share.mul_(0.5)
    codec.quantiser.sums.zero_()
    assert codec.fingerprint == own
    assert small(update="ema", quantise_latents=True).fingerprint != own
    with torch.no_grad():
        codec.quantiser.codebook[0].add_(1.0)
    assert codec.fingerprint != own
