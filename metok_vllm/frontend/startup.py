"""What is checked and set when a METok model's configuration is built: before anything is loaded or allocated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm import envs
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from metok_vllm.compression.selection import prune_layers
from metok_vllm.contract.server_choices import attach_settings
from metok_vllm.contract.settings import parse_settings
from metok_vllm.frontend.aligner_inputs import resolve_aligner
from metok_vllm.log import metok_logger
from metok_vllm.media.loader import prefer_loader
from metok_vllm.models.registry import SUPPORTED
from metok_vllm.scheduler.scheduler import MetokScheduler
from metok_vllm.worker.rpc import MetokWorkerExtension

if TYPE_CHECKING:
    from vllm.config import SchedulerConfig, VllmConfig

logger = metok_logger(__name__)


class MetokConfig(VerifyAndUpdateConfig):
    """vLLM calls this for the architectures that METok registers (`MODELS_CONFIG_MAP`)."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        refuse_unsupported(vllm_config)
        model_config = vllm_config.model_config
        additional = vllm_config.additional_config
        given = additional.get("metok") if isinstance(additional, dict) else None
        settings = parse_settings(given)
        layers = model_config.hf_text_config.num_hidden_layers
        try:
            chosen = prune_layers(layers, settings.prune_layers)
        except ValueError as error:
            raise ValueError(f"METok (additional_config): {error}.") from None
        aligner, tower = resolve_aligner(model_config.model, settings.aligner, settings.aligner_model)
        attach_settings(model_config.hf_config, settings)
        prefer_loader(model_config.get_multimodal_config().media_io_kwargs)
        _set_worker_extension(vllm_config)
        model_config.hf_config.metok_step_tokens = step_tokens(vllm_config.scheduler_config)
        logger.info(
            "METok: prunes before layers %s of %d, keep_ratio %s, decode_retention %s, aligner %s%s",
            "/".join(map(str, chosen)),
            layers,
            settings.keep_ratio,
            settings.decode_retention,
            aligner,
            f" ({tower})" if tower else "",
        )


def step_tokens(scheduler: SchedulerConfig) -> int:
    """Longest prompt that never has to be deferred: one step takes it however busy the server is."""
    # Decodes of all other requests take one token each of a step.
    whole = (scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens) - scheduler.max_num_seqs
    return min(whole, scheduler.long_prefill_token_threshold or whole)


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Refuse what METok cannot do right, each in one sentence that names the flag to change.

    Raises:
        ValueError: with that sentence; vLLM ends the start with it.
    """
    parallel = vllm_config.parallel_config
    scheduler = vllm_config.scheduler_config
    model_config = vllm_config.model_config
    stock = {supported.stock.removesuffix("ForConditionalGeneration") for supported in SUPPORTED}
    model_type = model_config.hf_config.model_type.replace("_", "").lower()
    multimodal = model_config.multimodal_config
    faults = {
        f"METok cannot serve a {model_config.hf_config.model_type} model; it can serve: "
        f"{', '.join(supported.stock for supported in SUPPORTED)}.": model_type not in {s.lower() for s in stock},
        "METok needs the model's video input: remove --language-model-only.": (
            multimodal is None or multimodal.language_model_only
        ),
        "METok generates text: remove --runner pooling and --convert.": model_config.runner_type != "generate",
        "METok does not support pipeline parallelism: use --tensor-parallel-size instead of --pipeline-parallel-size.": (
            parallel.pipeline_parallel_size > 1
        ),
        "METok does not support context parallelism: leave --decode-context-parallel-size and "
        "--prefill-context-parallel-size at 1.": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "METok does not support micro-batching: remove --enable-dbo and --ubatch-size.": parallel.use_ubatching,
        "METok does not support speculative decoding: remove --speculative-config.": (
            vllm_config.speculative_config is not None
        ),
        "METok does not support KV transfer: remove --kv-transfer-config.": vllm_config.kv_transfer_config is not None,
        # vLLM turns this option into a KV transfer after it has called us.
        "METok does not support KV offloading: remove --kv-offloading-size.": (
            vllm_config.cache_config.kv_offloading_size is not None
        ),
        "METok does not support an encoder cache transfer: remove --ec-transfer-config.": (
            vllm_config.ec_transfer_config is not None
        ),
        "METok needs the language model beside the encoder: remove --mm-encoder-only.": vllm_config.is_mm_encoder_only,
        "METok needs the hybrid KV cache manager: remove --disable-hybrid-kv-cache-manager.": (
            scheduler.disable_hybrid_kv_cache_manager is True
        ),
        "METok needs its own scheduler, which METok sets itself: remove --scheduler-cls.": (
            scheduler.scheduler_cls is not None and not _is_metok_scheduler(scheduler.scheduler_cls)
        ),
        "METok does not support vLLM's own video pruning beside it: remove --video-pruning-rate.": bool(
            multimodal is not None and getattr(multimodal, "video_pruning_rate", None)
        ),
        # Stock LLaVA-OneVision has no LoRA in vLLM 0.32; vLLM itself says so after it has loaded the weights.
        "METok does not support LoRA: remove --enable-lora.": vllm_config.lora_config is not None,
        "METok does not support prompt embeddings: remove --enable-prompt-embeds.": model_config.enable_prompt_embeds,
        "METok cannot share multimodal items by shared memory: leave --mm-processor-cache-type at lru.": bool(
            multimodal is not None and multimodal.mm_processor_cache_type == "shm"
        ),
        "METok does not support KV sharing fast prefill: remove --kv-sharing-fast-prefill.": (
            vllm_config.cache_config.kv_sharing_fast_prefill
        ),
        # A pruned prompt takes no chunk of one token and leaves none behind, so steps of two tokens may never end it.
        "METok needs chunks of 3 tokens or more: raise --long-prefill-token-threshold.": (
            0 < scheduler.long_prefill_token_threshold < 3
        ),
        "METok does not support breakable CUDA graphs: unset VLLM_USE_BREAKABLE_CUDAGRAPH and VLLM_BATCH_INVARIANT.": (
            envs.VLLM_USE_BREAKABLE_CUDAGRAPH or envs.VLLM_BATCH_INVARIANT
        ),
        "METok needs Model Runner V2: unset VLLM_USE_V2_MODEL_RUNNER=0.": envs.VLLM_USE_V2_MODEL_RUNNER is False,
        "METok needs Model Runner V2, but vLLM chose V1: its warning above this says why.": (
            not vllm_config.use_v2_model_runner
        ),
    }
    for sentence, is_fault in faults.items():
        if is_fault:
            raise ValueError(sentence)
    if scheduler.scheduler_cls is None:
        scheduler.scheduler_cls = MetokScheduler


def _set_worker_extension(vllm_config: VllmConfig) -> None:
    extension = f"{MetokWorkerExtension.__module__}.{MetokWorkerExtension.__qualname__}"
    parallel = vllm_config.parallel_config
    if parallel.worker_extension_cls not in ("", extension):
        raise ValueError(
            "METok needs its own worker extension, which METok sets itself: remove --worker-extension-cls."
        )
    parallel.worker_extension_cls = extension


def _is_metok_scheduler(scheduler_cls: object) -> bool:
    name = f"{MetokScheduler.__module__}.{MetokScheduler.__qualname__}"
    return scheduler_cls == name or (isinstance(scheduler_cls, type) and issubclass(scheduler_cls, MetokScheduler))
