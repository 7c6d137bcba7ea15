"""The weight-transfer engine inside each vLLM worker: staged in the background, loaded in the pause.

vLLM's ``start_weight_update`` and ``finish_weight_update`` do nothing here. The whole load is in ``update_weights``, after the version is
in hand and verified, so that a version that never came leaves the model as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from neox_rl.errors import WeightError
from neox_rl.keys import Keys
from neox_rl.weights.snapshot import tensors_of
from neox_rl.weights.stager import Stager

logger = init_logger("vllm.neox_rl")


@dataclass
class ZmqInit(WeightTransferInitInfo):  # type: ignore[misc]
    """``address`` of the publisher; ``server``, this server's name in the acks."""

    address: str
    server: str


@dataclass
class ZmqUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """The version to load, and how long to wait for it if it is not yet staged."""

    version: int
    deadline_s: float


class ZmqWeightTransferEngine(WeightTransferEngine[ZmqInit, ZmqUpdate]):  # type: ignore[misc]
    """Every tensor-parallel rank fetches whole tensors; vLLM's weight loaders take its shard."""

    init_info_cls = ZmqInit
    update_info_cls = ZmqUpdate
    _stager: Stager | None = None

    def init_transfer_engine(self, init_info: ZmqInit) -> None:
        """Starts staging from the publisher. A second call replaces the first: the trainer may have come back elsewhere."""
        self.shutdown()
        self._stager = Stager(init_info.address, f"{init_info.server}/{self.parallel_config.rank}", keys=Keys.of_environment())

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: dict[str, object]) -> None:
        # The base class synchronizes the accelerator, which raises where there is none.
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: ZmqUpdate) -> None:
        """Loads one staged version. Raises DeadlineError or WeightError; a WeightError after the load began means a broken model."""
        if self._stager is None:
            raise WeightError("no publisher: POST /init_weight_transfer_engine first")
        staged = self._stager.take(update_info.version, update_info.deadline_s)
        begin = time.perf_counter()
        expected = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)
        load: Callable[[Iterable[tuple[str, torch.Tensor]]], set[str]] = getattr(self.model, "load_weights")  # noqa: B009
        loaded = load(tensors_of(staged).items())
        if missing := sorted((expected - set(loaded)) | self._partly_loaded()):
            raise WeightError(f"v{staged.version} has no weights, or not all, for {missing[:5]} ({len(missing)} in all)")
        finalize_layerwise_reload(self.model, self.model_config)
        self._refresh_tied_heads()
        logger.info("v%d (%s) loaded in %.1f ms", staged.version, staged.digest, (time.perf_counter() - begin) * 1e3)

    def _refresh_tied_heads(self) -> None:
        """An output layer that shares the embedding's memory receives no weights of its own, so vLLM does not process it again: on a CPU it
        would go on with the packed copy that it made of the old weights."""
        for layer in self.model.modules():
            if isinstance(layer, ParallelLMHead) and self.model_config.hf_config.tie_word_embeddings:
                layer.quant_method.process_weights_after_loading(layer)

    def _partly_loaded(self) -> set[str]:
        """Layers that got some of their weights: a fused one, say, whose k came and whose q did not.

        vLLM would go on with whatever memory the rest holds, and with the old weights of a layer that got nothing. Embeddings are padded
        to a round vocabulary and never full.
        """
        layers = ((name, layer, get_layerwise_info(layer)) for name, layer in self.model.named_modules())
        return {
            name
            for name, layer, info in layers
            if not isinstance(layer, VocabParallelEmbedding) and 0 < info.load_numel < (info.load_numel_total or 0)
        }

    def finish_weight_update(self) -> None:
        pass

    def shutdown(self) -> None:
        if self._stager is not None:
            self._stager.close()
            self._stager = None
