"""Kimi Linear: the published model's numbers, and the equivalences that every use relies on."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jaxalope
from jaxalope import InputError, Model
from jaxalope.layers.stack import plan, restack, unstack
from jaxalope.model import KimiLinearConfig, build_model, config_from_dict, config_to_dict
from jaxalope.model.kimi_linear_weights import config_from_published, config_to_published
from jaxalope.model.published import published_tensors
from jaxalope.sharding import AxisRules, MeshConfig, abstract, init_params, make_mesh, use_mesh

TINY = KimiLinearConfig.tiny()


def random_model(config, seed=0, spread=0.3):
    """A model whose weights are large enough for every layer to matter."""
    graphdef, params = init_params(lambda key: build_model(config, key), jax.random.key(seed))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    leaves = [
        leaf + spread * jax.random.normal(k, leaf.shape) / np.sqrt(leaf.shape[-1])
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return Model(config, graphdef, jax.tree.unflatten(treedef, leaves))


def tokens_of(shape, config=TINY, seed=3):
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape).astype(np.int32)


@pytest.fixture(scope="module")
def tiny():
    return random_model(TINY)


@pytest.fixture(scope="module")
def golden(fixtures):
    """transformers' KimiLinearForCausalLM with random weights, and what it computes."""
    folder = fixtures / "kimi_linear_tiny"
    model = jaxalope.load(folder)
    tensors = load_file(folder / "model.safetensors")
    return model, tensors, dict(np.load(folder / "io.npz"))


class TestGoldens:
    def test_logits(self, golden):
        model, _, io = golden
        np.testing.assert_allclose(model(io["input_ids"])[0], io["logits"], atol=1e-4)

    def test_prefill_then_decode(self, golden):
        model, _, io = golden
        ids, cache = io["input_ids"], model.init_cache(2, 64)
        logits, cache = model(ids[:, :50], cache)
        rows = [logits[:, -1]]
        for t in range(50, 60):
            logits, cache = model(ids[:, t : t + 1], cache)
            rows.append(logits[:, 0])
        np.testing.assert_allclose(np.stack(rows, 1), io["prefill50_decode10_logits"], atol=1e-4)
        assert cache.length.tolist() == [60, 60]

    def test_loss_and_gradients(self, golden, fixtures):
        model, _, io = golden
        ids = io["input_ids"]

        def loss(params):
            logits = nnx.merge(model.graphdef, params)(jnp.asarray(ids))[0]
            logprobs = jax.nn.log_softmax(logits[:, :-1])
            return -jnp.mean(jnp.take_along_axis(logprobs, ids[:, 1:, None], -1))

        value, grads = jax.jit(jax.value_and_grad(loss))(model.params)
        np.testing.assert_allclose(value, io["loss"], rtol=1e-5)
        published = published_tensors(dataclasses.replace(model, params=grads))
        names = {
            "grad_embed": "model.embed_tokens.weight",
            "grad_A_log_layer0": "model.layers.0.self_attn.A_log",
            "grad_dt_bias_layer0": "model.layers.0.self_attn.dt_bias",
            "grad_q_proj_layer0": "model.layers.0.self_attn.q_proj.weight",
            "grad_kv_b_proj_layer3": "model.layers.3.self_attn.kv_b_proj.weight",
            "grad_gate_layer1": "model.layers.1.block_sparse_moe.gate.weight",
        }
        for golden_name, name in names.items():
            expected = io[golden_name]
            np.testing.assert_allclose(
                published[name].reshape(expected.shape),
                expected,
                atol=2e-4 * np.abs(expected).max(),
                err_msg=name,
            )
        # The rest by norm, under transformers' run-time names.
        norms = json.loads((fixtures / "kimi_linear_tiny/notes.json").read_text())
        for name, norm in norms["grad_norms_runtime_names"].items():
            if name in published:
                ours = np.linalg.norm(published[name])
                np.testing.assert_allclose(ours, norm, rtol=1e-3, err_msg=name)


class TestEquivalences:
    @pytest.mark.parametrize("split", [1, 5, 20, 37])
    def test_decode_equals_forward(self, tiny, split):
        ids = tokens_of((2, 37))
        expected, _ = tiny(ids)
        cache, rows, at = tiny.init_cache(2, 40), [], 0
        while at < 37:
            logits, cache = tiny(ids[:, at : at + split], cache)
            rows.append(logits)
            at += split
        np.testing.assert_allclose(np.concatenate(rows, 1), expected, atol=2e-4)

    def test_ragged_prefill_equals_each_row_alone(self, tiny):
        lengths = [1, 9, 20]
        ids = tokens_of((3, 20))
        valid = (np.arange(20) < np.array(lengths)[:, None]).astype(np.int32)
        logits, cache = tiny(ids, tiny.init_cache(3, 32), segment_ids=valid)
        after, _ = tiny(ids[:, :1], cache)
        for row, length in enumerate(lengths):
            alone, own = tiny(ids[row : row + 1, :length], tiny.init_cache(1, 32))
            np.testing.assert_allclose(logits[row, :length], alone[0], atol=1e-4)
            next_alone, _ = tiny(ids[row : row + 1, :1], own)
            np.testing.assert_allclose(after[row], next_alone[0], atol=1e-4)
        assert cache.length.tolist() == lengths

    def test_scan_equals_unrolled(self, tiny):
        scanned = plan(TINY.kinds)
        assert (scanned.start, scanned.period, scanned.repeats, scanned.stop) == (1, 2, 2, 5)
        unrolled = dataclasses.replace(TINY, scan_layers=False)
        blocks = unstack(tiny.params["stack"], scanned)
        params = {**tiny.params, "stack": restack(blocks, plan(TINY.kinds, scan=False))}
        graphdef, shapes, _ = abstract(lambda key: build_model(unrolled, key))
        assert jax.tree.structure(shapes) == jax.tree.structure(params)
        other = tiny.unrolled()
        assert other.config == unrolled
        jax.tree.map(np.testing.assert_array_equal, other.params, params)
        ids = tokens_of((2, 21))
        np.testing.assert_array_equal(Model(unrolled, graphdef, params)(ids)[0], other(ids)[0])
        np.testing.assert_allclose(other(ids)[0], tiny(ids)[0], atol=1e-4)
        cached, _ = other(ids, other.init_cache(2, 32))
        np.testing.assert_allclose(cached, tiny(ids, tiny.init_cache(2, 32))[0], atol=1e-4)
        again = restack(blocks, scanned)
        jax.tree.map(np.testing.assert_array_equal, again, tiny.params["stack"])

    def test_packed_equals_separate(self, tiny):
        lengths = [7, 1, 18, 5]
        ids = tokens_of((1, 40))
        segments = np.zeros((1, 40), np.int32)
        expected, at = [], 0
        for number, length in enumerate(lengths, start=1):
            segments[0, at : at + length] = number
            expected.append(tiny(ids[:, at : at + length])[0])
            at += length
        packed, _ = tiny(ids, segment_ids=segments)
        np.testing.assert_allclose(packed[:, :at], np.concatenate(expected, 1), atol=1e-4)
        assert np.isfinite(packed).all()

    @pytest.mark.long
    def test_remat_does_not_change_gradients(self, tiny):
        ids = tokens_of((1, 12))

        def grads(graphdef):
            def loss(params):
                return jnp.sum(jnp.square(nnx.merge(graphdef, params)(jnp.asarray(ids))[0]))

            return jax.jit(jax.grad(loss))(tiny.params)

        expected = grads(tiny.graphdef)
        for remat in ("full", "dots", "all_dots"):
            config = dataclasses.replace(TINY, remat=remat)
            graphdef, _, _ = abstract(lambda key, config=config: build_model(config, key))
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
                grads(graphdef),
                expected,
            )

    @pytest.mark.long
    @pytest.mark.parametrize(
        "mesh",
        [
            MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
            MeshConfig(data=2, fsdp=2, tensor=2, explicit=False),
        ],
        ids=["fsdp-expert-tensor", "data-fsdp-tensor, auto"],
    )
    def test_eight_devices_equal_one(self, tiny, mesh):
        ids = tokens_of((4, 16))
        segments = np.ones((4, 16), np.int32)
        segments[:, 10:] = 2
        segments[1, 13:] = 0

        def loss(params, ids, segments):
            model = nnx.merge(tiny.graphdef, params)
            hidden, _, stats = model.hidden_states(ids, segment_ids=segments)
            keep = (segments != 0)[..., None]
            return jnp.sum(jnp.where(keep, jnp.square(model.logits(hidden)), 0)), stats

        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        expected = step(tiny.params, ids, segments)
        mesh = make_mesh(mesh)
        sharded = tiny.on(mesh)
        with use_mesh(mesh, AxisRules()):
            rows = jax.NamedSharding(mesh, AxisRules().spec(("batch", "seq")))
            found = jax.jit(jax.value_and_grad(loss, has_aux=True))(
                sharded.params, jax.device_put(ids, rows), jax.device_put(segments, rows)
            )
            logits, cache = sharded(jax.device_put(ids, rows), sharded.init_cache(4, 24))
            last, _ = sharded(jax.device_put(ids[:, :1], rows), cache)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), found, expected
        )
        alone, cache = tiny(ids, tiny.init_cache(4, 24))
        np.testing.assert_allclose(logits, alone, atol=1e-4)
        np.testing.assert_allclose(last, tiny(ids[:, :1], cache)[0], atol=1e-4)

    @pytest.mark.long
    def test_born_unrolled_and_run_on_eight_devices(self, tiny):
        mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
        build = lambda key: build_model(TINY, key)  # noqa: E731
        _, initial = init_params(build, jax.random.key(0), mesh)
        _, unsharded = init_params(build, jax.random.key(0))
        # The same draws; their last bit may differ with how a compiler fuses the scaling.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), initial, unsharded
        )
        sharded = tiny.on(mesh)
        assert jax.tree.all(
            jax.tree.map(lambda a, b: a.sharding == b.sharding, initial, sharded.params)
        )
        apart, ids = sharded.unrolled(), tokens_of((4, 16))
        stacked = sharded.params["stack"]["body"][0]["mixer"]["q_proj"]["kernel"].sharding.spec
        kernel = apart.params["stack"]["head"][1]["mixer"]["q_proj"]["kernel"].sharding.spec
        assert tuple(kernel)[:2] == tuple(stacked)[1:3] == ("fsdp", "tensor")
        expected, _ = tiny(ids, tiny.init_cache(4, 24))
        np.testing.assert_allclose(apart(ids, apart.init_cache(4, 24))[0], expected, atol=1e-4)

    def test_bfloat16_is_close_and_finite(self, tiny):
        ids = tokens_of((2, 33))
        config = dataclasses.replace(TINY, dtype="bfloat16")
        graphdef, _, _ = abstract(lambda key: build_model(config, key))
        low, _ = Model(config, graphdef, tiny.params)(ids)
        full, _ = tiny(ids)
        assert low.dtype == jnp.float32
        error = np.sqrt(np.mean(np.square(low - full)) / np.mean(np.square(full)))
        assert error < 0.1

    def test_bounded_gate(self):
        model = random_model(dataclasses.replace(TINY, kda_gate_lower_bound=-5.0))
        ids = tokens_of((2, 20))
        expected, _ = model(ids)
        _, cache = model(ids[:, :19], model.init_cache(2, 20))
        np.testing.assert_allclose(model(ids[:, 19:], cache)[0][:, 0], expected[:, 19], atol=2e-4)
        unbounded, _ = random_model(TINY)(ids)
        assert np.abs(unbounded - expected).max() > 1e-3


class TestCounts:
    def test_published_size(self):
        config = KimiLinearConfig.kimi_linear_48b()
        assert round(config.num_params() / 1e9, 2) == 49.12
        active = config.num_params(active=True, embedding=False, head=False)
        assert round(active / 1e9, 2) == 2.73
        assert round(config.num_params(active=True, embedding=False) / 1e9, 2) == 3.11
        assert config._mixer_params("kda") == 39_514_272
        assert config._mixer_params("mla") == 29_114_880
        assert config._ffn_params("moe", active=False) == 1_819_607_296
        assert config._ffn_params("dense", active=False) == 63_700_992

    @pytest.mark.parametrize(
        ("name", "published"),
        [
            ("scaling_653m", 653e6),
            ("scaling_878m", 878e6),
            ("scaling_1b1", 1.1e9),
            ("scaling_1b4", 1.4e9),
            ("scaling_1b7", 1.7e9),
        ],
    )
    def test_scaling_law_sizes(self, name, published):
        config = getattr(KimiLinearConfig, name)()
        active = config.num_params(active=True, embedding=False, head=False)
        assert abs(active / published - 1) < 0.01
        _, shapes, _ = abstract(lambda key: build_model(config, key))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == config.num_params()

    @pytest.mark.parametrize("config", [TINY, KimiLinearConfig.demo()], ids=["tiny", "demo"])
    def test_count_equals_the_tree(self, config):
        _, shapes, _ = abstract(lambda key: build_model(config, key))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == config.num_params()

    def test_flops(self):
        """The KDA operator costs 184k FLOPs a token and head; 5.9M a layer of the 48B model."""
        config = KimiLinearConfig.kimi_linear_48b()
        without = dataclasses.replace(config, kda_head_dim=128, kda_chunk_size=64)
        matrices = 2 * config.num_params(active=True, embedding=False)
        forward = without.flops_per_token(0) / 3
        assert round((forward - matrices) / 20 / 1e6, 1) == 5.9
        assert round((forward - matrices) / 20 / 32 / 1e3) == 184

    def test_latent_cache_of_the_48b_model_is_8064_bytes_a_token(self):
        config = KimiLinearConfig.kimi_linear_48b()
        graphdef, shapes, _ = abstract(lambda key: build_model(config, key))

        def cache_bytes(length):
            cache = jax.eval_shape(lambda p: nnx.merge(graphdef, p).init_cache(1, length), shapes)
            return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))

        assert cache_bytes(2) - cache_bytes(1) == 8064
        assert round(cache_bytes(0) / 2**20, 1) == round(40 + 20 * 3 * 3 * 4096 * 2 / 2**20, 1)


class TestConfig:
    def test_round_trip(self):
        for config in (TINY, KimiLinearConfig.kimi_linear_48b()):
            stored = json.loads(json.dumps(config_to_dict(config)))
            assert config_from_dict(stored) == config

    def test_published_form_round_trips(self):
        config = KimiLinearConfig.kimi_linear_48b()
        published = json.loads(json.dumps(config_to_published(config)))
        again = dataclasses.replace(
            config_from_published(published), dtype=config.dtype, remat=config.remat
        )
        assert again == config
        with pytest.raises(InputError, match="q_lora_rank=1536 is another computation"):
            config_from_published({**published, "q_lora_rank": 1536})
        bounded = dataclasses.replace(config, kda_gate_lower_bound=-5.0)
        with pytest.raises(InputError, match=r"kda_gate_lower_bound=-5\.0 has no place"):
            config_to_published(bounded)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"kda_layers": (1, 2)}, "kda_layers"),
            ({"num_experts_per_token": 9}, "num_experts_per_token=9"),
            ({"dtype": "float16"}, "float16"),
            ({"remat": "some"}, "some"),
            ({"hidden_size": 0}, "hidden_size=0"),
        ],
    )
    def test_bad_fields_are_named(self, change, words):
        with pytest.raises(InputError, match=words):
            dataclasses.replace(TINY, **change)

    def test_unknown_field_suggests_the_nearest(self):
        with pytest.raises(InputError, match="did you mean 'hidden_size'"):
            config_from_dict({**config_to_dict(TINY), "hiden_size": 3})

    def test_divisibility_names_tensor_dim_and_axis(self):
        mesh = make_mesh(MeshConfig(data=1, tensor=8))
        with pytest.raises(InputError, match=r"dim `heads`=2 does not divide mesh axis `tensor`=8"):
            init_params(lambda key: build_model(TINY, key), jax.random.key(0), mesh)

    def test_token_outside_the_vocabulary_is_named(self, tiny):
        with pytest.raises(InputError, match=r"token id 320 at \(0, 1\)"):
            tiny(np.array([[0, 320]]))
