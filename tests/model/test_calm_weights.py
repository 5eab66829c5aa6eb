"""CALM as it is published: both models, three heads, every alias, and the released code's numbers.

``fixtures/calm`` has a model of random weights and what the released code makes of it:
github.com/shaochenze/calm, run once on a CPU with the transformers that it asks for (4.43) and
torch 2.13. Its tensors are as ``save_pretrained`` wrote them, copies left out (``diffusion:`` and
``flow:`` stand before the names of heads that have the same ones), and so are its two
``config.json``, but for a path; ``golden.npz`` has the inputs, with every random number that was
drawn, and the outputs.
"""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

import jaxalope
from jaxalope import InputError, Model
from jaxalope.layers.latent_heads.diffusion import Schedule
from jaxalope.model import CALMAutoencoderConfig, CALMConfig, build_model
from jaxalope.model.calm_weights import PUBLISHED
from jaxalope.model.published import load_into, published_tensors, read_config
from jaxalope.sharding import init_params

HEADS = {"energy": "Energy", "diffusion": "Diffusion", "flow": "Flow"}
TABLE, TIED = "encoder.embed_tokens.weight", "decoder.lm_head_weight"


@pytest.fixture(scope="module")
def tensors(fixtures):
    return {name: x.copy() for name, x in load_file(fixtures / "calm/tensors.safetensors").items()}


@pytest.fixture(scope="module")
def golden(fixtures):
    return dict(np.load(fixtures / "calm/golden.npz"))


def of_head(tensors, head, copies):
    """The tensors of the model with this head; with those that PyTorch writes twice."""
    out = {n.removeprefix(f"{head}:"): x for n, x in tensors.items() if n.startswith(f"{head}:")}
    out |= {n: x for n, x in tensors.items() if n.startswith(("transformer.", "embed_", "ae_"))}
    if head == "energy":
        own = {n: x for n, x in tensors.items() if n.startswith("mlp_generator.")}
        out |= own
        if copies:
            out |= {n.replace("mlp_generator.", "generative_head."): x for n, x in own.items()}
    if copies:
        out[f"ae_model.{TIED}"] = out[f"ae_model.{TABLE}"]
    return out


def of_autoencoder(tensors, copies):
    own = {n.removeprefix("ae_model."): x for n, x in tensors.items() if n.startswith("ae_model.")}
    return own | {TIED: own[TABLE]} if copies else own


@pytest.fixture
def publish(tmp_path, fixtures, tensors, write_torch):
    """``publish("energy")``: a directory as released, of a head's model or ``"autoencoder"``."""

    def write(kind, copies=True, form="bin", config=None, change=None):
        folder = tmp_path / f"published_{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        if kind == "autoencoder":
            contents = json.loads((fixtures / "calm/autoencoder_config.json").read_text())
            own = of_autoencoder(tensors, copies)
        else:
            contents = json.loads((fixtures / "calm/config.json").read_text())
            contents["architectures"] = [f"{HEADS[kind]}Transformer"]
            own = of_head(tensors, kind, copies)
        contents |= config or {}
        (folder / "config.json").write_text(json.dumps(contents, indent=2) + "\n")
        if change is not None:
            change(own)
        if form == "bin":
            write_torch(folder / "pytorch_model.bin", own)
        else:
            save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write


def same_bytes(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert (x.dtype, x.shape) == (b[name].dtype, b[name].shape), name
        assert x.tobytes() == b[name].tobytes(), name


class TestReleasedNumbers:
    @pytest.fixture
    def arrays(self, golden):
        return {name: jnp.asarray(x) for name, x in golden.items() if "schedule" not in name}

    @staticmethod
    def close(found, expected):
        found, scale = np.asarray(found), max(1.0, float(np.abs(expected).max()))
        assert found.shape == expected.shape
        np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)

    def module(self, publish, kind):
        return jaxalope.load(publish(kind)).module()

    def test_autoencoder(self, publish, arrays):
        model = self.module(publish, "autoencoder")
        mean, log_std = model.encode(arrays["tokens"])
        self.close(mean, arrays["mean"])
        self.close(log_std, arrays["log_std"])
        self.close(model.logits(model.decode(arrays["latents"])), arrays["logits"])

    def test_energy(self, publish, arrays):
        model = self.module(publish, "energy")
        self.close(model(arrays["tokens"])[0], arrays["hidden"])
        self.close(model.autoencoder.encode(arrays["tokens"])[0], arrays["mean"])
        drawn = model.draw(arrays["hidden"], arrays["energy/noise"])
        self.close(drawn, arrays["energy/draws"])

    def test_diffusion(self, publish, arrays):
        model = self.module(publish, "diffusion")
        self.close(model(arrays["tokens"])[0], arrays["hidden"])
        head, hidden = model.latent_head, arrays["hidden"]
        latents, time, noise = (arrays[f"diffusion/{n}"] for n in ("latents", "time", "noise"))
        self.close(head.network(latents, time, hidden), arrays["diffusion/network"])
        # A latent's loss is between 1 and 1000, as its time has it: each on its own scale.
        loss = head.loss(hidden, latents, time, noise)
        np.testing.assert_allclose(loss, arrays["diffusion/loss"], rtol=1e-5)
        # The first time's is of a bin of an image's levels, of which some are tails.
        first = head.loss(hidden, arrays["diffusion/latents2"], jnp.zeros_like(time), noise)
        np.testing.assert_allclose(first, arrays["diffusion/loss2"], rtol=1e-4)
        schedule = Schedule.cosine(100)
        for index in (99, 50, 1, 0):
            mean, log_variance, _ = head._step_back(schedule, latents, jnp.int32(index), hidden)
            added = jnp.exp(log_variance / 2) * arrays["diffusion/step_noise"] * (index > 0)
            self.close(mean + added, arrays[f"diffusion/step{index}"])
        drawn = head(hidden[:1, :2], arrays["diffusion/sample_noise"])
        self.close(drawn, arrays["diffusion/draws"])

    def test_flow(self, publish, arrays):
        model = self.module(publish, "flow")
        self.close(model(arrays["tokens"])[0], arrays["hidden"])
        head, hidden = model.latent_head, arrays["hidden"]
        latents, time, noise = (arrays[f"flow/{n}"] for n in ("latents", "time", "noise"))
        self.close(head._velocity(latents, time, hidden), arrays["flow/network"])
        loss = head.loss(hidden, latents, time, noise)
        np.testing.assert_allclose(loss, arrays["flow/loss"], rtol=1e-5)
        self.close(head(hidden, noise), arrays["flow/draws"])
        head.solver, head.num_steps = "euler", 20
        self.close(head(hidden, noise), arrays["flow/draws_euler"])

    def test_schedule(self, golden):
        for steps, every in ((1000, 111), (100, 1)):
            schedule = Schedule.cosine(steps)
            for name in ("alpha_bar", "log_beta", "log_posterior", "latent", "noisy"):
                expected = golden[f"schedule/{steps}/{name}"]
                found = getattr(schedule, name)[::every]
                np.testing.assert_allclose(found, expected, rtol=1e-10, err_msg=name)
            np.testing.assert_array_equal(
                schedule.times[::every], golden[f"schedule/{steps}/times"]
            )


class TestRoundTrips:
    @pytest.mark.parametrize("form", ["bin", "safetensors"])
    @pytest.mark.parametrize("copies", [True, False], ids=["copies", "no copies"])
    @pytest.mark.parametrize("kind", [*HEADS, "autoencoder"])
    def test_published_to_ours_to_published(
        self, publish, tensors, tmp_path, recwarn, kind, copies, form
    ):
        folder = publish(kind, copies, form)
        jaxalope.save(jaxalope.load(folder), tmp_path / "again")
        own = of_autoencoder(tensors, copies) if kind == "autoencoder" else None
        same_bytes(
            load_file(tmp_path / "again/model.safetensors"), own or of_head(tensors, kind, copies)
        )
        texts = [(path / "config.json").read_bytes() for path in (folder, tmp_path / "again")]
        assert texts[0] == texts[1]
        assert not [w for w in recwarn if issubclass(w.category, UserWarning)], "all is known"

    @pytest.mark.parametrize("kind", ["energy", "autoencoder"])
    def test_through_a_workdir(self, publish, tensors, tmp_path, kind):
        """Copies are remembered there, and a config.json without the autoencoder's sizes."""
        folder = publish(kind)
        jaxalope.save(jaxalope.load(folder), tmp_path / "workdir", "orbax")
        jaxalope.save(jaxalope.load(tmp_path / "workdir"), tmp_path / "again")
        own = of_autoencoder(tensors, True) if kind == "autoencoder" else None
        same_bytes(
            load_file(tmp_path / "again/model.safetensors"), own or of_head(tensors, kind, True)
        )
        assert (folder / "config.json").read_text() == (tmp_path / "again/config.json").read_text()

    @pytest.mark.parametrize("kind", [*HEADS, "autoencoder"])
    def test_ours_to_published_to_ours(self, tensors, tmp_path, kind):
        config = CALMAutoencoderConfig.tiny()
        expected = of_autoencoder(tensors, False)
        if kind != "autoencoder":
            config = dataclasses.replace(
                CALMConfig.tiny(),
                num_layers=2,
                head=kind,
                head_steps=None if kind == "energy" else 7,
                # Not those of released files, so that they must have been written.
                autoencoder=dataclasses.replace(
                    config, rms_norm_eps=1e-5, num_encoder_layers=0, num_decoder_layers=2
                ),
            )
            expected = of_head(tensors, kind, False)
        graphdef, params = init_params(lambda key: build_model(config, key), jax.random.key(0))
        model = Model(config, graphdef, params)
        jaxalope.save(model, tmp_path / "again")
        again = jaxalope.load(tmp_path / "again")
        assert again.config == config
        jax.tree.map(np.testing.assert_array_equal, again.params, params)
        written = load_file(tmp_path / "again/model.safetensors")
        assert sum(x.size for x in written.values()) == config.num_params()
        # Nothing that released files have no name for.
        layers = ("_layers.",) if kind != "autoencoder" else ("decoder_layers.",)
        names = {n for n in written if not any(part in n for part in layers)}
        assert names <= set(expected)
        same_bytes(written, published_tensors(model.unrolled()))

    def test_the_command_line_reads_their_files(self, publish, tmp_path):
        """Both ways, what each model makes compared."""
        for kind in ("energy", "autoencoder"):
            folder = publish(kind)
            command = [sys.executable, "-m", "jaxalope.model.convert", f"--from={folder}"]
            command += [f"--to={tmp_path}/{kind}", "--verify"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert "largest difference of the outputs: 0 " in done.stdout


class TestReading:
    def test_the_class_says_which_model_it_is(self, publish):
        """Files that the released code writes have no ``model_type``; one by hand is taken too."""
        for kind in HEADS:
            config, _, contents = read_config(epath.Path(publish(kind)))
            assert config.head == kind and "model_type" not in contents
        config, _, _ = read_config(epath.Path(publish("autoencoder")))
        assert config == CALMAutoencoderConfig(
            vocab_size=23,
            latent_size=6,
            hidden_size=10,
            intermediate_size=14,
            num_decoder_layers=4,
            bos_token_id=20,
            eos_token_id=21,
            pad_token_id=22,
        )

    def test_a_model_type_is_believed_before_the_class(self, publish):
        folder = publish("flow", config={"model_type": "flow", "architectures": None})
        assert jaxalope.load(folder).config.head == "flow"

    def test_sizes_of_the_autoencoder_come_from_its_tensors(self, publish):
        config = jaxalope.load(publish("energy")).config
        alone = jaxalope.load(publish("autoencoder")).config
        assert config.autoencoder == alone
        assert (config.num_kv_heads, config.noise_size, config.head_layers) == (1, 5, 2)

    def test_without_the_autoencoder_its_tensors_are_missing(self, publish):
        def leave_out(own):
            for name in [name for name in own if name.startswith("ae_model.")]:
                del own[name]

        with pytest.raises(InputError, match=r"missing ae_model\.encoder\.embed_tokens\.weight"):
            jaxalope.load(publish("energy", change=leave_out))

    def test_copies_that_differ_are_refused(self, publish):
        def change(own):
            name = "generative_head.mlp_blocks.1.linears.4.weight"
            own[name] = own[name] + 1

        words = r"mlp_generator\.mlp_blocks\.1\.linears\.4\.weight and generative_head\.\S+ are one"
        with pytest.raises(InputError, match=words):
            jaxalope.load(publish("energy", change=change))

    def test_either_of_two_names_will_do(self, publish, tensors, tmp_path):
        def change(own):
            for name in list(own):
                if name.startswith("mlp_generator.") or name == f"ae_model.{TABLE}":
                    del own[name]

        folder = publish("energy", form="safetensors", change=change)
        jaxalope.save(jaxalope.load(folder), tmp_path / "again")
        same_bytes(
            load_file(folder / "model.safetensors"), load_file(tmp_path / "again/model.safetensors")
        )

    def test_what_does_not_fit_is_named(self, publish):
        for change, words in [
            ({"hidden_act": "gelu"}, "hidden_act='gelu' is another computation"),
            ({"attention_bias": True}, "attention_bias=True is another computation"),
            ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear' is not"),
            ({"patch_size": 3}, r"squeeze_layer\.weight has shape \(10, 40\).*needs \(10, 30\)"),
            ({"ae_config": {"vocab_size": 24}}, r"vocab_size=23, and its ae_config has 24"),
            ({"model_type": "gan"}, "model_type='gan' is no family.*diffusion, energy, flow"),
        ]:
            with pytest.raises(InputError, match=f"(?s){words}"):
                jaxalope.load(publish("energy", config=change))

    def test_a_dtype_is_of_the_parts_too(self, publish):
        config = jaxalope.load(publish("energy"), dtype="bfloat16").config
        assert config.dtype == config.autoencoder.dtype == "bfloat16"

    def test_a_run_begins_with_a_published_autoencoder(self, publish, tensors):
        folder = publish("autoencoder")
        config = jaxalope.load(folder).config
        wanted = {"embed.embedding": jax.ShapeDtypeStruct((23, 10), jnp.float32)}
        found = load_into(epath.Path(folder), config, wanted)
        np.testing.assert_array_equal(found["embed.embedding"], tensors[f"ae_model.{TABLE}"])
        assert len(found) == len(of_autoencoder(tensors, False))


def test_released_sizes(fixtures):
    """CALM-M as the released scripts make it, with no autoencoder to read sizes from."""
    contents = json.loads((fixtures / "calm/config.json").read_text()) | {
        "vocab_size": 128257,
        "latent_size": 128,
        "hidden_size": 1024,
        "intermediate_size": 2752,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_mlp_layers": 4,
        "noise_size": 64,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "pad_token_id": 128256,
        "torch_dtype": "bfloat16",
    }
    config = PUBLISHED.config(contents, dict)
    assert config == dataclasses.replace(CALMConfig.medium(), remat="none")
    assert PUBLISHED.config(PUBLISHED.config_to(config), dict) == dataclasses.replace(
        config,
        dtype="float32",
        autoencoder=dataclasses.replace(config.autoencoder, dtype="float32"),
    )
