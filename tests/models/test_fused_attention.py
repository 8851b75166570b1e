"""The fused kernels against the plain path: numbers, gradients, shardings, and which is chosen.

Splash attention runs in Pallas' interpreter here. cuDNN's kernel needs a GPU: what is tested
without one is the calls that it lowers to, and what they ask for, answered by XLA.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoa_jax.data.config import DataConfig
from smoa_jax.models.attention import attend, segment_mask
from smoa_jax.models.decoder import REMAT_POLICIES, Decoder, abstract_params
from smoa_jax.models.fused_attention import (
    AttentionSharding,
    CudnnAttention,
    SplashAttention,
    choose_attention,
)
from smoa_jax.sharding.mesh import BATCH_AXES, MeshConfig, make_mesh
from smoa_jax.training.config import ModelConfig, RunConfig, TrainConfig
from smoa_jax.training.model import load_model, make_decoder
from tests.models import tiny
from tests.models.test_remat import factors_of, kept_sizes, with_factors

SPLASH = SplashAttention(interpret=True, block=128)
BASE = dataclasses.replace(tiny.CONFIG, num_heads=4, num_kv_heads=2, head_dim=8, query_scale=0.3)
LOCAL = dataclasses.replace(BASE, sliding_window=50, local_layers=(True, False, True))


def rows_of_segments(batch: int, time: int) -> np.ndarray:
    """A packed row with padding, rows of one segment with padding, and one that is all padding."""
    segments = np.zeros((batch, time), np.int32)
    segments[:, : time - 10] = 1
    segments[0, time // 3 : time // 2] = 2
    segments[0, time // 2 : time - 10] = 3
    segments[-1] = 0
    return segments


def operands(config, time: int, batch: int = 2, dtype=jnp.float32):
    """Query, key, value, and a cotangent that does not spare the padding."""
    rng = np.random.default_rng(0)
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads, config.num_heads)
    shapes = [(batch, time, count, config.head_dim) for count in heads]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def forward_and_gradients(function, query, key, value, cotangent, segment_ids, local):
    """``function``'s result, and the gradients of its three operands."""

    @jax.jit
    def both(query, key, value, segment_ids, local):
        run = functools.partial(function, segment_ids=segment_ids, local=local)
        result, pull = jax.vjp(run, query, key, value)
        return result, pull(cotangent)

    result, gradients = both(query, key, value, segment_ids, local)
    return [np.asarray(x, np.float32) for x in (result, *gradients)]


def plain(config):
    """The plain path under the decoder's masks, called as a fused kernel is."""

    def run(query, key, value, *, segment_ids, local):
        if segment_ids is None:
            segment_ids = jnp.ones(query.shape[:2], jnp.int32)
        mask = segment_mask(segment_ids)
        if local is not None:
            mask = jnp.where(local, segment_mask(segment_ids, config.sliding_window), mask)
        scale, cap = config.attention_scale, config.attention_soft_cap
        return attend(query, key, value, mask, scale=scale, cap=cap)

    return run


def assert_equals_plain(fused, config, arrays, segments, local, tolerance):
    named = functools.partial(fused, config=config)
    found = forward_and_gradients(named, *arrays, segments, local)
    expected = forward_and_gradients(plain(config), *arrays, segments, local)
    for one, other in zip(found, expected, strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("changes", "time", "packed", "local"),
    [
        pytest.param({"num_kv_heads": 4}, 256, False, None, id="causal"),
        pytest.param({"head_dim": 12}, 130, False, None, id="grouped, ragged"),
        pytest.param({"num_kv_heads": 1}, 200, True, None, id="one kv head, packed"),
        pytest.param({"attention_soft_cap": 1.5}, 200, True, True, id="capped, packed, local"),
        pytest.param({"attention_soft_cap": 1.5}, 200, True, False, id="capped, packed, global"),
    ],
)
def test_splash_equals_the_plain_path_forward_and_backward(changes, time, packed, local):
    config = dataclasses.replace(BASE if local is None else LOCAL, **changes)
    segments = jnp.asarray(rows_of_segments(2, time)) if packed else None
    flag = None if local is None else jnp.asarray(local)
    assert_equals_plain(SPLASH, config, operands(config, time), segments, flag, 1e-5)


def test_a_window_that_covers_the_row_needs_no_second_kernel():
    def kernels(window: int) -> int:
        config = dataclasses.replace(LOCAL, sliding_window=window)
        arrays = operands(config, 64)[:3]
        run = functools.partial(SPLASH, segment_ids=None, local=jnp.asarray(True), config=config)
        return str(jax.make_jaxpr(run)(*arrays)).count("pallas_call[")

    assert kernels(64) == 1
    assert kernels(63) == 2


def test_a_block_that_no_register_fits_is_refused():
    with pytest.raises(ValueError, match="got block 200; expected a multiple of 128"):
        SplashAttention(block=200)


@pytest.fixture(scope="module")
def sharding():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    return AttentionSharding(mesh=mesh, batch=BATCH_AXES, heads=("tensor",))


def test_splash_on_a_mesh_equals_the_plain_path(sharding):
    fused = dataclasses.replace(SPLASH, sharding=sharding)
    segments = jnp.asarray(rows_of_segments(4, 140))
    arrays = operands(LOCAL, 140, batch=4)
    assert_equals_plain(fused, LOCAL, arrays, segments, jnp.asarray(True), 1e-5)


@pytest.mark.parametrize(("batch", "kv_heads"), [(6, 2), (4, 1)])
def test_rows_and_heads_that_the_mesh_does_not_divide_are_refused(sharding, batch, kv_heads):
    fused = dataclasses.replace(SPLASH, sharding=sharding)
    config = dataclasses.replace(BASE, num_kv_heads=kv_heads)
    arrays = operands(config, 8, batch)[:3]
    with pytest.raises(ValueError, match=f"got {batch} rows and {kv_heads} key/value heads over 4"):
        fused(*arrays, segment_ids=None, local=None, config=config)


@functools.cache
def decoder_results(family: str, remat: str = "none", fused: SplashAttention | None = None):
    """Logits, and the gradients of the adapter's factors."""
    config = tiny.FAMILIES[family]
    params = tiny.adapt(tiny.params_of(config), 3, b_std=0.3)
    tokens, segments = tiny.tokens(2, 30), jnp.asarray(rows_of_segments(2, 30))
    weights = np.random.default_rng(2).normal(size=(*tokens.shape, 61)).astype(np.float32)
    decoder = Decoder(config, dtype=jnp.float32, remat=remat, fused=fused)

    def loss(factors):
        variables = {"params": with_factors(params, factors)}
        logits = decoder.apply(variables, tokens, segment_ids=segments)
        return jnp.sum(logits * weights), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(factors_of(params))
    return [np.asarray(x) for x in (logits, *jax.tree.leaves(gradients))]


@pytest.mark.parametrize(
    ("family", "remat"),
    [
        ("gemma2", "projections"),
        ("gemma3", "none"),
        ("llama", "full"),
        ("llama", "dots"),
        ("llama", "dots_no_batch"),
    ],
)
def test_decoders_with_splash_equal_those_without_whatever_is_kept(family, remat):
    found, expected = decoder_results(family, remat, SPLASH), decoder_results(family)
    for one, other in zip(found, expected, strict=True):
        scale = np.abs(other).max()
        assert scale > 0
        np.testing.assert_allclose(one / scale, other / scale, atol=2e-5)


@pytest.mark.parametrize("remat", sorted(REMAT_POLICIES))
def test_splash_keeps_nothing_of_a_weights_size(remat):
    # One block of padded queries, the most that a kernel may keep, is 128 * 6 * 8 here; k_proj,
    # the smallest kernel, is 1024 * 2 * 8.
    config = dataclasses.replace(tiny.FAMILIES["gemma2"], embed_dim=1024, mlp_dim=64)
    params = tiny.adapt(tiny.params_of(config), 3, b_std=0.1)
    decoder = Decoder(config, dtype=jnp.bfloat16, remat=remat, fused=SPLASH)
    sizes = kept_sizes(decoder, params, factors_of(params), with_factors)
    assert max(sizes) < 1024 * 2 * 8


@pytest.fixture
def no_cudnn_check(monkeypatch):
    """JAX asks for the version of cuDNN while tracing, which is nowhere to be found here."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def cudnn_calls(packed: bool, sharding=None) -> list[tuple[str, int]]:
    """Name and window of every cuDNN call in a forward and backward pass lowered for CUDA."""
    config = dataclasses.replace(LOCAL, head_dim=64)
    fused = CudnnAttention(packed=packed, sharding=sharding)
    *arrays, cotangent = operands(config, 64, batch=4, dtype=jnp.bfloat16)

    @jax.jit
    def both(query, key, value, segment_ids, local):
        run = functools.partial(fused, segment_ids=segment_ids, local=local, config=config)
        return jax.vjp(run, query, key, value)[1](cotangent)

    segments = jnp.asarray(rows_of_segments(4, 64))
    traced = both.trace(*arrays, segments, jnp.asarray(True))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"@__cudnn\$fmha(\w*)\(.*?CAUSAL.*?window_length\\22: (\d+)", text)
    return sorted((name, int(window)) for name, window in calls)


@pytest.mark.parametrize("on_mesh", [False, True])
def test_cudnn_lowers_to_one_flash_kernel_for_each_window(no_cudnn_check, sharding, on_mesh):
    found = cudnn_calls(packed=False, sharding=sharding if on_mesh else None)
    forward, backward = "Softmax", "SoftmaxBackward"
    assert found == [(forward, 0), (forward, 50), (backward, 0), (backward, 50)]


def test_cudnn_takes_the_mask_of_packed_rows_as_a_bias(no_cudnn_check):
    names = cudnn_calls(packed=True)
    assert names == [("ScaleBiasSoftmax", 0), ("ScaleBiasSoftmaxBackward", 0)]


@pytest.mark.parametrize(("packed", "local"), [(False, None), (False, True), (True, True)])
def test_what_cudnn_is_asked_for_is_the_plain_path(monkeypatch, packed, local):
    library, asked = jax.nn.dot_product_attention, []

    def by_xla(*arrays, implementation=None, **named):
        asked.append(implementation)
        return library(*arrays, implementation="xla", **named)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    segments = jnp.asarray(rows_of_segments(2, 70)) if packed else None
    flag = None if local is None else jnp.asarray(local)
    fused = CudnnAttention(packed=packed)
    assert_equals_plain(fused, LOCAL, operands(LOCAL, 70), segments, flag, 1e-5)
    assert "cudnn" in asked


def test_rows_that_are_not_packed_need_no_segments_for_their_tokens(monkeypatch):
    library = jax.nn.dot_product_attention
    by_xla = functools.partial(library, implementation="xla")
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *a, implementation=None, **k: by_xla(*a, **k)
    )
    segments = jnp.asarray(rows_of_segments(3, 40))[1:]
    *arrays, cotangent = operands(BASE, 40)
    # What is read of a row is its tokens: no gradient comes from its padding.
    cotangent = cotangent * (segments > 0)[..., None, None]
    named = functools.partial(CudnnAttention(packed=False), config=BASE)
    found = forward_and_gradients(named, *arrays, cotangent, segments, None)
    expected = forward_and_gradients(plain(BASE), *arrays, cotangent, segments, None)
    tokens = np.asarray(segments > 0)
    np.testing.assert_allclose(found[0][tokens], expected[0][tokens], rtol=1e-5, atol=1e-5)
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_cudnn_on_a_gpu_is_close_to_the_plain_path(packed):
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU: run with SMOA_TEST_PLATFORM=cuda")
    config = dataclasses.replace(LOCAL, head_dim=64)
    segments = jnp.asarray(rows_of_segments(2, 256)) if packed else None
    arrays = operands(config, 256, dtype=jnp.bfloat16)
    fused = CudnnAttention(packed=packed)
    assert_equals_plain(fused, config, arrays, segments, jnp.asarray(True), 3e-2)


def test_cudnn_refuses_a_soft_cap_that_it_would_forget():
    config = dataclasses.replace(BASE, attention_soft_cap=1.5)
    with pytest.raises(ValueError, match=r"got attention_soft_cap 1\.5; expected none"):
        CudnnAttention()(*operands(config, 8)[:3], segment_ids=None, local=None, config=config)


def choose(name: str, device: SimpleNamespace, **changes):
    """``choose_attention`` for a device that is not there."""
    known = {"dtype": jnp.bfloat16, "lengths": (512, 1024), "packed": False, **changes}
    config = dataclasses.replace(BASE, **known.pop("config", {}))
    place: Any = SimpleNamespace(mesh=SimpleNamespace(devices=np.array([device])))
    return choose_attention(name, config, sharding=place, **known)


CPU = SimpleNamespace(platform="cpu")
TPU = SimpleNamespace(platform="tpu")
H100 = SimpleNamespace(platform="gpu", compute_capability="9.0")
A100 = SimpleNamespace(platform="gpu", compute_capability="8.0")
V100 = SimpleNamespace(platform="gpu", compute_capability="7.0")
MI300 = SimpleNamespace(platform="gpu", compute_capability="gfx942")


@pytest.mark.parametrize(
    ("device", "changes", "expected"),
    [
        (TPU, {}, SplashAttention),
        (TPU, {"config": {"attention_soft_cap": 50.0}, "packed": True}, SplashAttention),
        (TPU, {"dtype": jnp.float32}, None),
        (TPU, {"lengths": (128, 256)}, None),
        (H100, {}, CudnnAttention),
        (H100, {"config": {"head_dim": 256}}, CudnnAttention),
        (H100, {"config": {"attention_soft_cap": 50.0}}, None),
        (H100, {"packed": True}, None),
        (A100, {"config": {"head_dim": 256}}, None),
        (V100, {}, None),
        (MI300, {}, None),
        (CPU, {}, None),
    ],
)
def test_auto_takes_what_the_devices_and_the_model_allow(device, changes, expected):
    chosen = choose("auto", device, **changes)
    assert chosen is None if expected is None else isinstance(chosen, expected)


def test_a_kernel_asked_for_by_name_is_taken_however_short_or_packed_the_rows():
    assert isinstance(choose("splash", TPU, lengths=(16,)), SplashAttention)
    packed = choose("cudnn", A100, lengths=(16,), packed=True)
    assert isinstance(packed, CudnnAttention)
    assert packed.packed
    assert choose("xla", TPU) is None


@pytest.mark.parametrize(
    ("name", "device", "changes", "message"),
    [
        ("splash", CPU, {}, "splash on platform 'cpu'; expected a TPU; choose auto or xla"),
        ("splash", TPU, {"dtype": jnp.float32}, "compute dtype float32; expected bfloat16"),
        ("cudnn", TPU, {}, "cudnn on platform 'tpu'; expected an NVIDIA GPU"),
        ("cudnn", V100, {}, "on compute capability 7.0; expected an NVIDIA GPU"),
        ("cudnn", MI300, {}, "on compute capability gfx942; expected an NVIDIA GPU"),
        ("cudnn", H100, {"dtype": jnp.float32}, "compute dtype float32; expected bfloat16"),
        ("cudnn", H100, {"config": {"attention_soft_cap": 50.0}}, "attention_soft_cap=50.0"),
        ("cudnn", A100, {"config": {"head_dim": 256}}, "head_dim=256; expected a multiple of 8"),
        ("cudnn", H100, {"config": {"head_dim": 20}}, "head_dim=20; expected a multiple of 8"),
        ("cudnn", H100, {"packed": True, "lengths": (7, 8)}, r"lengths \(7, 8\); expected even"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_by_name(name, device, changes, message):
    with pytest.raises(ValueError, match=f"got model.attention=.*{message}"):
        choose(name, device, **changes)


def run_config(**model: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path="somewhere", compute_dtype="bfloat16", **model),
        train=TrainConfig(output_dir="elsewhere", batch_size=8),
    )


def test_a_run_passes_its_mesh_rows_and_model_to_the_choice(monkeypatch, sharding):
    asked = {}

    def record(name, config, **named):
        asked.update(name=name, config=config, **named)
        return SPLASH

    monkeypatch.setattr("smoa_jax.training.model.choose_attention", record)
    config = run_config(attention="splash")
    config = dataclasses.replace(config, data=DataConfig(max_length=96, buckets=(32,), pack=True))
    model = dataclasses.replace(BASE, vocab_size=64)
    base: Any = SimpleNamespace(config=model, params=abstract_params(model))
    assert make_decoder(config, base, sharding.mesh).fused is SPLASH
    assert asked == {
        "name": "splash",
        "config": model,
        "dtype": jnp.bfloat16,
        "lengths": (32, 96),
        "packed": True,
        "sharding": sharding,
    }


def test_a_run_is_refused_its_kernel_before_any_weight_is_read(monkeypatch):
    abstract = SimpleNamespace(config=BASE, params=abstract_params(BASE))
    monkeypatch.setattr("smoa_jax.training.model.abstract_base", lambda *_: abstract)
    monkeypatch.setattr("smoa_jax.training.model.load_base", lambda *_: pytest.fail("read"))
    config = dataclasses.replace(run_config(attention="splash"), mesh=MeshConfig(data=8, fsdp=1))
    with pytest.raises(ValueError, match=r"model\.attention=splash on platform 'cpu'"):
        load_model(config)


def test_unknown_attention_is_refused():
    with pytest.raises(ValueError, match=r"model\.attention='flash'; expected one of auto, xla"):
        run_config(attention="flash")
