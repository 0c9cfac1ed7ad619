"""What METok refuses when vLLM's configuration is built, in which words, and what it sets.

No engine is started.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

import metok_vllm
from metok_vllm.contract.budgets import step_tokens
from metok_vllm.contract.server_choices import server_choices
from metok_vllm.frontend import startup
from metok_vllm.models.registry import SUPPORTED
from metok_vllm.scheduler.scheduler import MetokScheduler
from metok_vllm.worker.rpc import MetokWorkerExtension
from tests.unit.conftest import METOK

Make = Callable[..., Any]

NO = "METok does not support "
CAN = (
    "LlavaOnevisionForConditionalGeneration, LlavaQwenForCausalLM, Qwen2_5_VLForConditionalGeneration, "
    "Qwen2VLForConditionalGeneration, Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration, "
    "Qwen3_5ForConditionalGeneration, Qwen3_5MoeForConditionalGeneration, "
    "InternVLForConditionalGeneration, InternVLChatModel"
)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pipeline parallel": (
        {"pipeline_parallel_size": 2},
        f"{NO}pipeline parallelism with all its stages: use --tensor-parallel-size instead of --pipeline-parallel-size, "
        "or the setting stages 1.",
    ),
    "decode context parallel": (
        {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
        f"{NO}context parallelism: leave --decode-context-parallel-size and --prefill-context-parallel-size at 1.",
    ),
    "prefill context parallel": (
        {"prefill_context_parallel_size": 2},
        f"{NO}context parallelism: leave --decode-context-parallel-size and --prefill-context-parallel-size at 1.",
    ),
    "speculative decoding": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        f"{NO}speculative decoding: remove --speculative-config.",
    ),
    "KV transfer": (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        f"{NO}KV transfer: remove --kv-transfer-config.",
    ),
    "KV offloading": ({"kv_offloading_size": 1.0}, f"{NO}KV offloading: remove --kv-offloading-size."),
    "EC transfer": (
        {"ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_consumer"}},
        f"{NO}an encoder cache transfer: remove --ec-transfer-config.",
    ),
    "EC transfer, encoder only": (
        {"ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_producer"}},
        f"{NO}an encoder cache transfer: remove --ec-transfer-config.",
    ),
    "encoder only": (
        {"mm_encoder_only": True},
        "METok needs the language model beside the encoder: remove --mm-encoder-only.",
    ),
    "language model only": (
        {"language_model_only": True},
        "METok needs the model's video input: remove --language-model-only.",
    ),
    "pooling": ({"runner": "pooling"}, "METok generates text: remove --runner pooling and --convert."),
    "classify": ({"convert": "classify"}, "METok generates text: remove --runner pooling and --convert."),
    "no hybrid manager": (
        {"disable_hybrid_kv_cache_manager": True},
        "METok needs the hybrid KV cache manager: remove --disable-hybrid-kv-cache-manager.",
    ),
    "KV cache types": (
        {"kv_cache_dtype_skip_layers": ["0"]},
        f"{NO}several types of KV cache in one model: remove --kv-cache-dtype-skip-layers.",
    ),
    "other scheduler": (
        {"scheduler_cls": "vllm.v1.core.sched.async_scheduler.AsyncScheduler"},
        "METok needs its own scheduler, which METok sets itself: remove --scheduler-cls.",
    ),
    "LoRA": ({"enable_lora": True}, f"{NO}LoRA: remove --enable-lora."),
    "vLLM's video pruning": (
        {"video_pruning_rate": 0.5},
        f"{NO}vLLM's own video pruning beside it: remove --video-pruning-rate.",
    ),
    "prompt embeddings": ({"enable_prompt_embeds": True}, f"{NO}prompt embeddings: remove --enable-prompt-embeds."),
    "items in shared memory": (
        {"mm_processor_cache_type": "shm"},
        "METok cannot share multimodal items by shared memory: leave --mm-processor-cache-type at lru.",
    ),
    "fast prefill": (
        {"kv_sharing_fast_prefill": True},
        f"{NO}KV sharing fast prefill: remove --kv-sharing-fast-prefill.",
    ),
    "dual batch overlap": (
        {"enable_dbo": True},
        f"{NO}micro-batching: remove --enable-dbo and --ubatch-size.",
    ),
    "micro-batches": ({"ubatch_size": 2}, f"{NO}micro-batching: remove --enable-dbo and --ubatch-size."),
    "attention backend": (
        {"attention_backend": "FLASHINFER"},
        f"{NO}the attention backend FLASHINFER: use FLASH_ATTN or TRITON_ATTN in --attention-backend.",
    ),
    "attention backend, by the config": (
        {"attention_config": {"backend": "FLEX_ATTENTION"}},
        f"{NO}the attention backend FLEX_ATTENTION: use FLASH_ATTN or TRITON_ATTN in --attention-backend.",
    ),
    "attention backend, by kind": (
        {"attention_config": {"backend": "FLASH_ATTN", "backend_per_kind": {"full_attention": "FLASHINFER"}}},
        f"{NO}the attention backend FLASHINFER: use FLASH_ATTN or TRITON_ATTN in --attention-config.",
    ),
    "other worker extension": (
        {"worker_extension_cls": "somebody.Else"},
        "METok needs its own worker extension, which METok sets itself: remove --worker-extension-cls.",
    ),
    "chunks of 2": (
        {"long_prefill_token_threshold": 2},
        "METok needs chunks of 3 tokens or more: raise --long-prefill-token-threshold.",
    ),
}

EXPERTS = (
    "METok does not support a mixture of experts with data or expert parallelism: "
    "use --tensor-parallel-size instead of --data-parallel-size and --enable-expert-parallel."
)
ROUTED_EXPERTS = (
    "METok cannot return the experts of pruned tokens, which have none: remove --enable-return-routed-experts."
)


def refusal(make_config: Make, **kwargs: Any) -> str:
    """The one sentence in vLLM's message."""
    with pytest.raises(ValueError, match="METok") as error:
        make_config(**kwargs)
    lines = str(error.value).splitlines()
    if len(lines) == 1:
        return lines[0]
    # pydantic wraps a sentence of ours: a title, then the sentence with its own notes behind it.
    return lines[1].strip().removeprefix("Value error, ").split(" [type=")[0]


@pytest.mark.parametrize("what", REFUSED)
def test_refused(make_config: Make, what: str) -> None:
    arguments, sentence = REFUSED[what]
    assert refusal(make_config, **arguments) == sentence


@pytest.mark.parametrize("what", REFUSED)
def test_none_of_it_concerns_a_server_without_metok(make_config: Make, what: str) -> None:
    """Where stock vLLM refuses too, it does so in words of its own."""
    said = ""
    try:
        make_config(metok=False, **REFUSED[what][0])
    except ValueError as error:
        said = str(error)
    assert "METok" not in said


def test_tensor_descriptors_are_refused(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_TRITON_USE_TD", "1")
    assert refusal(make_config) == (
        "METok does not support tensor descriptors in TRITON_ATTN: unset VLLM_TRITON_USE_TD."
    )


@pytest.mark.parametrize("variable", ["VLLM_USE_BREAKABLE_CUDAGRAPH", "VLLM_BATCH_INVARIANT"])
def test_breakable_graphs_are_refused(make_config: Make, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    # vLLM itself sets the first variable where the second one is set; monkeypatch takes both back.
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")
    monkeypatch.setenv(variable, "1")
    assert refusal(make_config) == (
        "METok does not support breakable CUDA graphs: unset VLLM_USE_BREAKABLE_CUDAGRAPH and VLLM_BATCH_INVARIANT."
    )


def test_synchronous_scheduling_is_accepted(make_config: Make) -> None:
    assert make_config(async_scheduling=False).scheduler_config.get_scheduler_cls() is MetokScheduler


def test_every_flag_that_a_sentence_names_exists() -> None:
    parser = FlexibleArgumentParser(prog="vllm")  # type: ignore[no-untyped-call]
    ServeSubcommand().subparser_init(parser.add_subparsers())
    known = parser._subparsers._group_actions[0].choices["serve"]._option_string_actions  # type: ignore[union-attr]
    sentences = [*(sentence for _, sentence in REFUSED.values()), EXPERTS, ROUTED_EXPERTS]
    named = {word.rstrip(".:,") for sentence in sentences for word in sentence.split() if word.startswith("--")}
    assert len(named) > 15
    assert named <= set(known)


def test_model_runner_v1(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert refusal(make_config) == "METok needs Model Runner V2: unset VLLM_USE_V2_MODEL_RUNNER=0."


def test_model_runner_v1_by_vllms_own_choice(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", False)
    assert refusal(make_config) == "METok needs Model Runner V2, but vLLM chose V1: its warning above this says why."


@pytest.mark.parametrize("level", [1, 2])
def test_python_without_assertions(make_config: Make, monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    class Flags:
        optimize = level

    monkeypatch.setattr("metok_vllm.frontend.startup.sys.flags", Flags)
    assert refusal(make_config) == (
        "METok and vLLM need Python's assertions: unset PYTHONOPTIMIZE and leave out python -O."
    )


def test_a_server_ends_with_the_sentence_alone(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM and pydantic would print a trace around a ValueError."""
    argv = ["vllm", "serve", "m", "--hf-overrides", json.dumps({"architectures": [METOK]})]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as stop:
        make_config(enable_lora=True)
    assert stop.value.code == "vllm: error: METok does not support LoRA: remove --enable-lora."


@pytest.mark.parametrize("listed", ["", "other", "other,another"])
def test_plugins_that_vllm_may_load(monkeypatch: pytest.MonkeyPatch, listed: str) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", listed)
    with pytest.raises(ValueError, match="METok") as error:
        metok_vllm.enable()
    assert str(error.value) == (
        "METok is not among the plugins that vLLM may load: add metok to VLLM_PLUGINS, or unset it."
    )
    monkeypatch.setenv("VLLM_PLUGINS", f"{listed},metok")
    assert metok_vllm.enable()


# --- stage 1 alone ---

OF_PRUNING = (
    *("pipeline parallel", "no hybrid manager", "KV cache types", "fast prefill", "attention backend"),
    *("attention backend, by the config", "attention backend, by kind", "chunks of 2"),
)


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_server_of_stage_1_takes(make_config: Make, what: str) -> None:
    """Nothing is pruned there, so only what concerns the video itself is refused."""
    arguments, sentence = REFUSED[what]
    arguments = {**arguments, "additional_config": {"metok": {"stages": 1}}}
    if what not in OF_PRUNING:
        assert refusal(make_config, **arguments) == sentence
        return
    said = ""
    try:
        config = make_config(**arguments)
    except ValueError as error:  # vLLM's own
        said = str(error)
    else:
        assert server_choices(config.model_config.hf_config).prune_layers is None
        assert config.cache_config.kv_cache_layout is None
        assert config.scheduler_config.get_scheduler_cls() is MetokScheduler
    assert "METok" not in said


def test_a_pipeline_and_rotary_positions_of_three_axes(make_config: Make, tmp_path: Path) -> None:
    from metok_vllm.demo.qwen_checkpoint import build_qwen_checkpoint

    arguments: dict[str, Any] = {
        "model": str(build_qwen_checkpoint(tmp_path, "qwen2.5-vl")),
        "hf_overrides": {"architectures": ["METokQwen2_5_VLForConditionalGeneration"]},
        "pipeline_parallel_size": 2,
    }
    assert refusal(make_config, **arguments) == REFUSED["pipeline parallel"][1]
    config = make_config(**arguments, additional_config={"metok": {"stages": 1}})
    assert config.model_config.uses_mrope
    assert config.parallel_config.pipeline_parallel_size == 2


@pytest.fixture(scope="module", params=["qwen3.5", "qwen3.5-moe"])
def hybrid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Arguments of a model whose language model cannot be pruned."""
    from metok_vllm.demo.qwen3_5_checkpoint import build_qwen3_5_checkpoint

    folder = build_qwen3_5_checkpoint(tmp_path_factory.mktemp("model"), request.param, layers=4)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["mamba_ssm_dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    return {"model": str(folder), "hf_overrides": {"architectures": [f"METok{config['architectures'][0]}"]}}


@pytest.mark.parametrize("settings", [None, {"stages": 3}, {"keep_ratio": 0.5}])
def test_a_model_that_cannot_be_pruned(make_config: Make, hybrid: dict[str, Any], settings: Any) -> None:
    assert refusal(make_config, **hybrid, additional_config={"metok": settings} if settings else {}) == (
        "METok cannot prune inside this model, since most of its layers carry a state along instead of attending "
        '(linear attention): start it with stage 1 alone, by --additional-config \'{"metok": {"stages": 1}}\' '
        "(in Python: metok_vllm.enable(stages=1))."
    )


def test_a_hybrid_model_is_set_up_as_stock_vllm_does(make_config: Make, hybrid: dict[str, Any]) -> None:
    """vLLM looks up by the architecture's name what it reads of the checkpoint, and METok's is another."""
    config = make_config(**hybrid, additional_config={"metok": {"stages": 1}}, enable_prefix_caching=True)
    assert config.cache_config.mamba_ssm_cache_dtype == "bfloat16"
    assert config.cache_config.mamba_cache_mode == "align"
    assert config.cache_config.kv_cache_layout is None
    assert server_choices(config.model_config.hf_config).settings.strides == (1, 2, 4)


# --- the model ---


def test_a_text_model_with_metoks_architecture(make_config: Make, text_checkpoint: Path) -> None:
    sentence = refusal(make_config, model=str(text_checkpoint))
    assert sentence == f"METok cannot serve a qwen2 model; it can serve: {CAN}."


def test_a_text_model_in_python(make_config: Make, text_checkpoint: Path) -> None:
    sentence = refusal(make_config, metok=False, model=str(text_checkpoint), **metok_vllm.enable())
    assert sentence.startswith("METok cannot serve ")
    assert sentence.endswith(f"(Qwen2ForCausalLM); it can serve: {CAN}.")


def test_another_implementation_of_the_model(make_config: Make) -> None:
    """vLLM itself refuses, before METok is asked: its Transformers backend has no class of METok's name."""
    with pytest.raises(ValueError, match=f"Cannot find model module. '{METOK}' is not a registered model in the"):
        make_config(model_impl="transformers")


@pytest.fixture(scope="module")
def mixture(checkpoint: Path) -> Path:
    """The config of the tiny checkpoint with a mixture of experts for its language model."""
    folder = checkpoint.parent / "mixture"
    folder.mkdir()
    config = json.loads((checkpoint / "config.json").read_text())
    text = config["text_config"]
    text.update(
        architectures=["Qwen2MoeForCausalLM"], model_type="qwen2_moe", num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=text["intermediate_size"], shared_expert_intermediate_size=text["intermediate_size"],
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for file in checkpoint.iterdir():
        if file.name != "config.json":
            os.symlink(file, folder / file.name)
    return folder


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"data_parallel_size": 2}, EXPERTS),
        ({"tensor_parallel_size": 2, "enable_expert_parallel": True}, EXPERTS),
        ({"enable_return_routed_experts": True}, ROUTED_EXPERTS),
    ],
)
def test_a_mixture_of_experts(make_config: Make, mixture: Path, arguments: dict[str, Any], sentence: str) -> None:
    assert make_config(model=str(mixture), tensor_parallel_size=2).model_config.is_moe
    assert refusal(make_config, model=str(mixture), **arguments) == sentence


# --- the settings ---


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"evnts": 3}, "METok (additional_config): unknown setting 'evnts'; the settings are preset, events, "),
        ({"events": 0}, "METok (additional_config): 'events' got 0: input should be greater than or equal to 1."),
        ({"query": "why?"}, "METok (additional_config): unknown setting 'query'; the settings are "),
        ("off", "METok (additional_config): the settings must be an object of keys and values, not 'off'."),
        (
            {"prune_layers": [1, 2, 5]},
            "METok (additional_config): prune_layers must be three increasing numbers from 1 to the model's 4 layers, "
            "not [1, 2, 5].",
        ),
        (
            {"prune_layers": [3, 2, 1]},
            "METok (additional_config): prune_layers must rise and start at 1 or later, not [3, 2, 1].",
        ),
        (
            {"prune_layers": [1, 2]},
            "METok (additional_config): 'prune_layers' got [1, 2]: it takes a list of three whole numbers or "
            '"cheap".',
        ),
        (
            {"kv_layers": [1, 5]},
            "METok (additional_config): kv_layers must end at the model's 4 layers or before, not [1, 5].",
        ),
        (
            {"kv_layers": [3, 4], "prune_layers": [1, 2, 3]},
            "METok (additional_config): kv_layers must start below the last of prune_layers, 3, from where on no visual "
            "token is left, not [3, 4].",
        ),
        (
            {"kv_layers": [1, 2], "stages": 1},
            "METok (additional_config): with stages 1 nothing is pruned inside the model, so 'kv_layers' has no effect: ",
        ),
        (
            {"aligner": "dual-tower"},
            "METok: aligner 'dual-tower' needs a SigLIP or CLIP checkpoint; set aligner_model, or ",
        ),
        ({"aligner_model": "/no/such/tower"}, "METok: the aligner /no/such/tower cannot be loaded: "),
    ],
)
def test_wrong_settings(make_config: Make, settings: Any, sentence: str) -> None:
    assert refusal(make_config, additional_config={"metok": settings}).startswith(sentence)


@pytest.mark.parametrize(("levels", "fits"), [(0, True), (1, True), (2, False)])
def test_extra_channels_are_added_below_l1(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, levels: int, fits: bool
) -> None:
    """Behind it some of their tokens are gone."""
    (model,) = [supported for supported in SUPPORTED if supported.metok == METOK]
    monkeypatch.setattr(startup, "SUPPORTED", (replace(model, levels=lambda config: levels),))
    settings = {"metok": {"prune_layers": [1, 2, 4]}}
    if fits:
        make_config(additional_config=settings)
        return
    assert refusal(make_config, additional_config=settings) == (
        "METok (additional_config): this model adds to its visual tokens behind its first 2 layers, so the first of "
        "prune_layers must be 2 or more, not 1."
    )
    make_config(additional_config={"metok": {"prune_layers": [2, 3, 4]}})


def test_a_tower_that_is_none(make_config: Make, text_checkpoint: Path) -> None:
    sentence = refusal(make_config, additional_config={"metok": {"aligner_model": str(text_checkpoint)}})
    assert sentence == f"METok: the aligner {text_checkpoint} is a qwen2 model; it must be one of siglip, clip."


def test_a_model_too_shallow(make_config: Make, tmp_path: Path) -> None:
    from metok_vllm.demo.checkpoint import build_checkpoint

    model = build_checkpoint(tmp_path / "shallow", layers=2)
    sentence = refusal(make_config, model=str(model))
    assert sentence == "METok (additional_config): a model needs at least 3 layers for three pruning layers, not 2."


def test_a_wrong_video_setting(make_config: Make) -> None:
    with pytest.raises(ValueError, match="Unknown video setting 'frames'; known are "):
        make_config(media_io_kwargs={"video": {"frames": 3}})


# --- what is set ---


def test_what_is_set(make_config: Make) -> None:
    config = make_config(additional_config={"metok": {"preset": "balanced", "prune_layers": [1, 2, 4]}, "else": 1})
    assert config.model_config.architecture == METOK
    assert config.scheduler_config.get_scheduler_cls() is MetokScheduler
    assert config.parallel_config.worker_extension_cls == (
        f"{MetokWorkerExtension.__module__}.{MetokWorkerExtension.__qualname__}"
    )
    assert config.model_config.multimodal_config.media_io_kwargs == {"video": {"video_backend": "metok"}}
    choices = server_choices(config.model_config.hf_config)
    assert (choices.settings.preset, choices.settings.decode_retention) == ("balanced", 1.0)
    assert choices.settings.quota == "video"
    assert choices.settings.prune_layers == choices.prune_layers == (1, 2, 4)
    assert config.additional_config["else"] == 1


def test_what_the_user_chose_stays(make_config: Make) -> None:
    name = f"{MetokScheduler.__module__}.{MetokScheduler.__qualname__}"
    config = make_config(
        scheduler_cls=name,
        worker_extension_cls=f"{MetokWorkerExtension.__module__}.{MetokWorkerExtension.__qualname__}",
        media_io_kwargs={"video": {"video_backend": "opencv", "num_frames": 3}},
    )
    assert config.scheduler_config.scheduler_cls == name
    assert config.model_config.multimodal_config.media_io_kwargs["video"] == {
        "video_backend": "opencv",
        "num_frames": 3,
    }


def test_blocks_are_outermost_unless_the_operator_chose_a_layout(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_KV_CACHE_LAYOUT", raising=False)
    assert make_config().cache_config.kv_cache_layout == "BLHNC"
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "BLHNC")
    assert make_config().cache_config.kv_cache_layout == "BLHNC"
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "LBHNC")
    assert make_config().cache_config.kv_cache_layout is None, "vLLM resolves it"


def test_cheap_layers_at_start(make_config: Make) -> None:
    config = make_config(additional_config={"metok": {"prune_layers": "cheap"}})
    assert server_choices(config.model_config.hf_config).prune_layers == (1, 2, 3)


def test_the_start_says_where_decoding_keeps_visual_tokens(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(startup.logger, "info", lambda line, *values: said.append(line % values))
    config = make_config(additional_config={"metok": {"kv_layers": [1, 3], "prune_layers": [2, 3, 4]}})
    assert server_choices(config.model_config.hf_config).window == (1, 3)
    assert "METok: prunes before layers 2/3/4 of 4, keep_ratio 0.76, kv_layers 1 to 2, aligner embedding" in said
    make_config()
    assert any(", decode_retention 0.0, aligner embedding" in line for line in said)


def test_enable_gives_the_same_configuration(make_config: Make) -> None:
    config = make_config(metok=False, **metok_vllm.enable(events=3))
    assert config.model_config.architecture == METOK
    assert config.scheduler_config.get_scheduler_cls() is MetokScheduler
    assert server_choices(config.model_config.hf_config).settings.events == 3


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        ({"max_num_batched_tokens": 2048, "max_num_seqs": 48}, 2000),
        ({"max_num_batched_tokens": 2048, "max_num_seqs": 48, "max_num_scheduled_tokens": 1048}, 1000),
        ({"max_num_batched_tokens": 2048, "max_num_seqs": 48, "long_prefill_token_threshold": 100}, 100),
        ({"max_num_batched_tokens": 64, "max_num_seqs": 48, "long_prefill_token_threshold": 100}, 16),
        ({"max_num_batched_tokens": 64, "max_num_seqs": 64}, 0),
    ],
)
def test_prompts_that_one_step_always_takes(make_config: Make, arguments: dict[str, int], tokens: int) -> None:
    config = make_config(**arguments)
    assert step_tokens(config.scheduler_config) == tokens
    assert server_choices(config.model_config.hf_config).step_tokens == tokens


@pytest.mark.parametrize(
    "arguments",
    [
        {"tensor_parallel_size": 2},
        {"enable_prefix_caching": True},
        {"enable_prefix_caching": False},
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 4096},
        {"long_prefill_token_threshold": 3},
        {"scheduling_policy": "priority"},
        {"mm_processor_cache_gb": 0},
        {"limit_mm_per_prompt": {"video": 2}},
        {"data_parallel_size": 2},
        {"attention_backend": "auto"},
        {"attention_backend": "FLASH_ATTN"},
        {"attention_backend": "TRITON_ATTN"},
        {"attention_backend": "CPU_ATTN"},
        {"attention_config": {"backend_per_kind": {"sliding_window": "FLASHINFER"}}},
        {"attention_config": {"flash_attn_version": 2}},
    ],
)
def test_served(make_config: Make, arguments: dict[str, Any]) -> None:
    assert make_config(**arguments).scheduler_config.get_scheduler_cls() is MetokScheduler


# --- answers compared with the model's own ---

SHADOW = {"additional_config": {"metok": {"shadow_rate": 0.1}}}


def test_a_server_that_compares_can_be_told_answers(make_config: Make) -> None:
    assert make_config(**SHADOW).model_config.enable_trace_replay
    assert not make_config().model_config.enable_trace_replay


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"logprobs_mode": "processed_logprobs"},
            "METok's shadow_rate compares the model's own log-probabilities: remove --logprobs-mode.",
        ),
        ({"max_logprobs": 19}, "METok's shadow_rate compares the best 20 tokens: let --max-logprobs be 20 or more."),
    ],
)
def test_what_is_in_the_way_of_comparing(make_config: Make, arguments: dict[str, Any], sentence: str) -> None:
    make_config(**arguments)
    with pytest.raises(ValueError, match="shadow_rate") as error:
        make_config(**SHADOW, **arguments)
    assert sentence in str(error.value)


def test_all_log_probabilities_are_enough(make_config: Make) -> None:
    assert make_config(**SHADOW, max_logprobs=-1).model_config.enable_trace_replay


def test_there_is_nothing_to_watch_in_python() -> None:
    with pytest.raises(ValueError, match="'shadow_rate' watches the requests of vllm serve"):
        metok_vllm.enable(shadow_rate=0.5)
    assert metok_vllm.enable(shadow_rate=0)["additional_config"] == {"metok": {"shadow_rate": 0}}
