"""What is checked and set when vLLM builds the configuration of a METok model:
before anything is loaded or allocated.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm import envs
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.platforms import current_platform

from metok_vllm.compression.selection import PruneLayers
from metok_vllm.contract.attention_backends import refused_backend
from metok_vllm.contract.budgets import step_tokens
from metok_vllm.contract.kv_layout import check_window, chosen_layers
from metok_vllm.contract.profile import told
from metok_vllm.contract.server_choices import ServerChoices, attach_choices
from metok_vllm.contract.settings import MetokSettings, parse_settings
from metok_vllm.frontend.aligner_choice import resolve_aligner
from metok_vllm.frontend.checkpoint_format import complete_config
from metok_vllm.frontend.command_line import was_asked
from metok_vllm.frontend.model_files import check_front_end
from metok_vllm.frontend.profile_choice import ChosenProfile, choose_profile, merged, warn_uncalibrated
from metok_vllm.frontend.shadow import prepare_shadow
from metok_vllm.log import metok_logger
from metok_vllm.media.in_force import set_in_force
from metok_vllm.models.registry import SUPPORTED, family_of

if TYPE_CHECKING:
    from vllm.config import CacheConfig, ModelConfig, VllmConfig

logger = metok_logger(__name__)

# By name: they run in other processes, and this one need not import them.
SCHEDULER = "metok_vllm.scheduler.scheduler.MetokScheduler"
WORKER_EXTENSION = "metok_vllm.worker.rpc.MetokWorkerExtension"


class MetokConfig(VerifyAndUpdateConfig):
    """vLLM calls this for the architectures that METok registers (`MODELS_CONFIG_MAP`)."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Check and set.

        Raises:
            ValueError: METok cannot serve this, in one sentence.
            SystemExit: the same, where a command line asked for METok. vLLM would print a trace around the
                sentence (pydantic's validation of `VllmConfig` turns a ValueError into an error of its own).
        """
        with _one_sentence():
            _configure(vllm_config)

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Add what the tokenizer says. Raises as above."""
        with _one_sentence():
            complete_config(model_config)


@contextmanager
def _one_sentence() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if not was_asked():
            raise
        raise SystemExit(f"vllm: error: {error}") from None


def _configure(vllm_config: VllmConfig) -> None:
    _configure_as_stock(vllm_config)
    settings, profile = server_settings(vllm_config)
    refuse_unprunable(vllm_config.model_config, settings.stages)
    refuse_unsupported(vllm_config, settings.stages)
    choices = choose(vllm_config, settings, profile)
    model_config = vllm_config.model_config
    attach_choices(model_config.hf_config, choices)
    prepare_shadow(model_config, choices.settings.shadow_rate)
    family = family_of(model_config.architectures)
    media_io_kwargs = model_config.get_multimodal_config().media_io_kwargs
    set_in_force(media_io_kwargs, choices.settings, family.sampling if family else {})
    check_front_end(model_config, choices.settings.chat_template)
    if vllm_config.scheduler_config.scheduler_cls is None:  # else a subclass of METok's, as the check has found
        vllm_config.scheduler_config.scheduler_cls = SCHEDULER
    vllm_config.parallel_config.worker_extension_cls = WORKER_EXTENSION
    tower = f" ({choices.tower})" if choices.tower else ""
    if choices.prune_layers is None:
        logger.info("METok: stage 1 alone, aligner %s%s", choices.aligner, tower)
        return
    choose_kv_cache_layout(vllm_config.cache_config)
    window = choices.window
    logger.info(
        "METok: prunes before layers %s of %d, keep_ratio %s, %s, aligner %s%s",
        "/".join(map(str, choices.prune_layers)),
        model_config.hf_text_config.num_hidden_layers,
        choices.settings.keep_ratio,
        f"kv_layers {window[0]} to {window[1] - 1}"
        if window
        else f"decode_retention {choices.settings.decode_retention}",
        choices.aligner,
        tower,
    )
    _tell_of_profile(model_config, choices)


def _configure_as_stock(vllm_config: VllmConfig) -> None:
    """What vLLM does for the stock architecture, which it looks up by name."""
    family = family_of(vllm_config.model_config.architectures)
    if family is not None:
        MODELS_CONFIG_MAP.get(family.stock, VerifyAndUpdateConfig).verify_and_update_config(vllm_config)


def _tell_of_profile(model_config: ModelConfig, choices: ServerChoices) -> None:
    """Which profile rules and how well it agreed; or that nobody has looked where this model reads."""
    if choices.profile is not None:
        logger.info("METok: %s", told(choices.profile))
    elif choices.settings.prune_layers is None:
        family = family_of(model_config.architectures)
        text = model_config.hf_text_config
        warn_uncalibrated(
            model_config.model, (family.stock,) if family else (), text.num_hidden_layers, text.hidden_size
        )


def choose_kv_cache_layout(cache_config: CacheConfig) -> None:
    """Blocks outermost, so that each kind of layer has a block size of its own (`contract/kv_layout.py`).

    An operator's `VLLM_KV_CACHE_LAYOUT` holds. vLLM takes a layout that is already set as it is
    (vllm/v1/attention/backends/utils.py, `resolve_kv_cache_layout`). Inside a block the order is the one that
    vLLM prefers: heads first on CPU, tokens first elsewhere.
    """
    layout = "BLHNC" if current_platform.is_cpu() else "BLNHC"
    if envs.VLLM_KV_CACHE_LAYOUT in (None, layout) and cache_config.kv_cache_layout is None:
        cache_config.kv_cache_layout = layout


def server_settings(vllm_config: VllmConfig) -> tuple[MetokSettings, ChosenProfile | None]:
    """What the user states, over the model's profile and the family's own strides; and that profile.

    A profile says how much may be pruned, so a server of stage 1 alone looks for none.

    Raises:
        ValueError: a setting is wrong, or the profile is of no use, in one sentence.
    """
    model_config, additional = vllm_config.model_config, vllm_config.additional_config
    stated = additional.get("metok") if isinstance(additional, dict) else None
    profile = None
    if isinstance(stated, Mapping | None) and (stated or {}).get("stages", 3) == 3:
        profile = choose_profile(stated or {}, model_config.model, model_config.revision)
        stated = stated if profile is None else merged(stated or {}, profile)
    return parse_settings(_with_strides(model_config, stated)), profile


def choose(vllm_config: VllmConfig, settings: MetokSettings, profile: ChosenProfile | None) -> ServerChoices:
    """What the user's settings come to for this model and this server.

    Raises:
        ValueError: a setting cannot be met, in one sentence.
    """
    model_config = vllm_config.model_config
    layers: PruneLayers | None = None
    if settings.stages == 3:
        try:
            layers = chosen_layers(model_config.hf_text_config.num_hidden_layers, settings.prune_layers)
            check_window(model_config.hf_text_config.num_hidden_layers, layers, settings.kv_layers)
        except ValueError as error:
            raise ValueError(f"METok (additional_config): {error}.") from None
        _refuse_layers(model_config, layers)
    aligner, tower = resolve_aligner(model_config.model, settings.aligner, settings.aligner_model)
    scheduler = vllm_config.scheduler_config
    return ServerChoices(
        settings,
        layers,
        aligner,
        tower,
        step_tokens(scheduler),
        scheduler.encoder_cache_size,
        None if profile is None else profile.summary(),
    )


def _with_strides(model_config: ModelConfig, stated: object) -> object:
    """What the user states, and the family's own strides where that says nothing of them."""
    family = family_of(model_config.architectures)
    if family is None or not isinstance(stated, Mapping | None):
        return stated
    return {"strides": family.strides, **(stated or {})}


def _refuse_layers(model_config: ModelConfig, layers: PruneLayers) -> None:
    """The tower's extra channels are added behind the first layers, to tokens that must all be there still.

    Raises:
        ValueError: the first pruning layer comes too early.
    """
    levels = max(
        (one.levels(model_config.hf_config) for one in SUPPORTED if one.metok in model_config.architectures), default=0
    )
    if layers[0] < levels:
        raise ValueError(
            f"METok (additional_config): this model adds to its visual tokens behind its first {levels} layers, so "
            f"the first of prune_layers must be {levels} or more, not {layers[0]}."
        )


def refuse_unprunable(model_config: ModelConfig, stages: int) -> None:
    """Refuse the later stages where the language model cannot have them; nothing is taken away in silence.

    Raises:
        ValueError: with the setting to add.
    """
    family = family_of(model_config.architectures)
    if family is not None and family.unprunable and stages != 1:
        raise ValueError(
            f"METok cannot prune inside this model, since {family.unprunable}: start it with stage 1 alone, by "
            """--additional-config '{"metok": {"stages": 1}}' (in Python: metok_vllm.enable(stages=1))."""
        )


def refuse_unsupported(vllm_config: VllmConfig, stages: int = 3) -> None:
    """Refuse what METok cannot do right, each in one sentence that names the flag to change.

    Args:
        stages: 1 where nothing is pruned inside the language model, whose layers, KV cache and attention are
            stock's then.

    Raises:
        ValueError: with that sentence; vLLM ends the start with it.
    """
    _refuse_interpreter()
    _refuse_model(vllm_config.model_config)
    _refuse_parallelism(vllm_config)
    _refuse_transfers(vllm_config)
    _refuse_scheduling(vllm_config)
    _refuse_runner(vllm_config)
    if stages == 1:
        return
    _refuse_stages_of_layers(vllm_config)
    _refuse_experts(vllm_config)
    _refuse_attention(vllm_config)
    _refuse_caches(vllm_config)
    _refuse_short_chunks(vllm_config)
    _refuse_graphs()


def _refuse_interpreter() -> None:
    """Stock vLLM does not start without its assertions either: its CPU worker fails, and the start hangs."""
    if sys.flags.optimize:
        raise ValueError("METok and vLLM need Python's assertions: unset PYTHONOPTIMIZE and leave out python -O.")


def _refuse_model(model_config: ModelConfig) -> None:
    served = {supported.metok: supported.model_types for supported in SUPPORTED}
    types = {name for architecture in model_config.architectures for name in served.get(architecture, ())}
    if model_config.hf_config.model_type not in types:
        can = ", ".join(supported.stock for supported in SUPPORTED)
        raise ValueError(f"METok cannot serve a {model_config.hf_config.model_type} model; it can serve: {can}.")
    _refuse_language_model(model_config)
    multimodal = model_config.multimodal_config
    if multimodal is None or multimodal.language_model_only:
        raise ValueError("METok needs the model's video input: remove --language-model-only.")
    if model_config.runner_type != "generate":
        raise ValueError("METok generates text: remove --runner pooling and --convert.")
    if model_config.skip_tokenizer_init:
        raise ValueError("METok reads the question with the model's tokenizer: remove --skip-tokenizer-init.")
    if model_config.enable_prompt_embeds:
        raise ValueError("METok does not support prompt embeddings: remove --enable-prompt-embeds.")
    if getattr(multimodal, "video_pruning_rate", None):
        raise ValueError("METok does not support vLLM's own video pruning beside it: remove --video-pruning-rate.")
    if multimodal.mm_processor_cache_type == "shm":
        raise ValueError(
            "METok cannot share multimodal items by shared memory: leave --mm-processor-cache-type at lru."
        )


def _refuse_language_model(model_config: ModelConfig) -> None:
    """Some families come with language models whose layers METok does not know how to call."""
    family, language = family_of(model_config.architectures), model_config.hf_text_config.model_type
    if family is not None and family.text_types and language not in family.text_types:
        raise ValueError(
            f"METok cannot serve a {family.stock} with the language model {language}; it can serve it with: "
            f"{', '.join(family.text_types)}."
        )


def _refuse_stages_of_layers(vllm_config: VllmConfig) -> None:
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(
            "METok does not support pipeline parallelism with all its stages: use --tensor-parallel-size instead of "
            "--pipeline-parallel-size, or the setting stages 1."
        )


def _refuse_parallelism(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise ValueError(
            "METok does not support context parallelism: leave --decode-context-parallel-size and "
            "--prefill-context-parallel-size at 1."
        )
    if parallel.use_ubatching:
        raise ValueError("METok does not support micro-batching: remove --enable-dbo and --ubatch-size.")


def _refuse_experts(vllm_config: VllmConfig) -> None:
    """From L1 up a layer's experts get other rows than the step has tokens.

    With data parallelism the ranks exchange rows by the number of tokens that each announced for the step
    (`ForwardContext.dp_metadata`), and with expert parallelism some backends do. The experts of every token
    cannot be returned either, since a pruned token never reaches those of the deep layers.
    """
    if not vllm_config.model_config.is_moe:
        return
    parallel = vllm_config.parallel_config
    if parallel.data_parallel_size > 1 or parallel.enable_expert_parallel:
        raise ValueError(
            "METok does not support a mixture of experts with data or expert parallelism: "
            "use --tensor-parallel-size instead of --data-parallel-size and --enable-expert-parallel."
        )
    if vllm_config.aux_output_config.enable_return_routed_experts:
        raise ValueError(
            "METok cannot return the experts of pruned tokens, which have none: remove --enable-return-routed-experts."
        )


def _refuse_attention(vllm_config: VllmConfig) -> None:
    """The backend that the user chose.

    One that vLLM chooses is known in the worker alone, and refused there: `worker/dense_attention.py`.
    """
    attention = vllm_config.attention_config
    # As vLLM resolves it for a language model's layers (`vllm/v1/attention/selector.py: get_attn_backend`).
    of_kind = attention.backend_per_kind.get("full_attention")
    backend = of_kind or attention.backend
    flag = "--attention-config" if of_kind else "--attention-backend"
    if backend is not None and (sentence := refused_backend(backend.name, flag)):
        raise ValueError(sentence)
    if envs.VLLM_TRITON_USE_TD:  # its kernel takes blocks of a power of two alone
        raise ValueError("METok does not support tensor descriptors in TRITON_ATTN: unset VLLM_TRITON_USE_TD.")


def _refuse_transfers(vllm_config: VllmConfig) -> None:
    cache = vllm_config.cache_config
    if vllm_config.kv_transfer_config is not None:
        raise ValueError("METok does not support KV transfer: remove --kv-transfer-config.")
    if cache.kv_offloading_size is not None:  # vLLM turns this option into a KV transfer after it has called us
        raise ValueError("METok does not support KV offloading: remove --kv-offloading-size.")
    if vllm_config.ec_transfer_config is not None:
        raise ValueError("METok does not support an encoder cache transfer: remove --ec-transfer-config.")


def _refuse_caches(vllm_config: VllmConfig) -> None:
    cache = vllm_config.cache_config
    if cache.kv_cache_dtype_skip_layers:  # the layers of a group would differ in bytes, and in metadata
        raise ValueError(
            "METok does not support several types of KV cache in one model: remove --kv-cache-dtype-skip-layers."
        )
    if cache.kv_sharing_fast_prefill:
        raise ValueError("METok does not support KV sharing fast prefill: remove --kv-sharing-fast-prefill.")
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager is True:
        raise ValueError("METok needs the hybrid KV cache manager: remove --disable-hybrid-kv-cache-manager.")


def _refuse_scheduling(vllm_config: VllmConfig) -> None:
    scheduler = vllm_config.scheduler_config
    if scheduler.scheduler_cls is not None and not _is_metok_scheduler(scheduler.scheduler_cls):
        raise ValueError("METok needs its own scheduler, which METok sets itself: remove --scheduler-cls.")
    if vllm_config.parallel_config.worker_extension_cls not in ("", WORKER_EXTENSION):
        raise ValueError(
            "METok needs its own worker extension, which METok sets itself: remove --worker-extension-cls."
        )


def _refuse_short_chunks(vllm_config: VllmConfig) -> None:
    # A pruned prompt takes no chunk of one token and leaves none behind, so steps of two tokens may never end
    # it.
    if 0 < vllm_config.scheduler_config.long_prefill_token_threshold < 3:
        raise ValueError("METok needs chunks of 3 tokens or more: raise --long-prefill-token-threshold.")


def _refuse_runner(vllm_config: VllmConfig) -> None:
    if vllm_config.speculative_config is not None:
        raise ValueError("METok does not support speculative decoding: remove --speculative-config.")
    if vllm_config.is_mm_encoder_only:
        raise ValueError("METok needs the language model beside the encoder: remove --mm-encoder-only.")
    if vllm_config.lora_config is not None:
        raise ValueError("METok does not support LoRA: remove --enable-lora.")
    if envs.VLLM_USE_V2_MODEL_RUNNER is False:
        raise ValueError("METok needs Model Runner V2: unset VLLM_USE_V2_MODEL_RUNNER=0.")
    if not vllm_config.use_v2_model_runner:
        raise ValueError("METok needs Model Runner V2, but vLLM chose V1: its warning above this says why.")


def _refuse_graphs() -> None:
    if envs.VLLM_USE_BREAKABLE_CUDAGRAPH or envs.VLLM_BATCH_INVARIANT:
        raise ValueError(
            "METok does not support breakable CUDA graphs: unset VLLM_USE_BREAKABLE_CUDAGRAPH and VLLM_BATCH_INVARIANT."
        )


def _is_metok_scheduler(scheduler_cls: object) -> bool:
    if isinstance(scheduler_cls, type):
        return any(f"{cls.__module__}.{cls.__qualname__}" == SCHEDULER for cls in scheduler_cls.__mro__)
    return scheduler_cls == SCHEDULER
