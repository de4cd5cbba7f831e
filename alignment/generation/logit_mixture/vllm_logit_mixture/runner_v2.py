"""The part of vLLM's second model runner: it tells of requests and of the order of the batch's rows. NEVER RUN.

That runner needs Triton and a GPU. What stands here was written from vLLM 0.32's source, and is tested against its
interface with stand-ins for its batches. Its requests keep their slots, and the rows of each step name theirs.
"""

import torch
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_logit_mixture.weights import mixture_of


class MixtureState(DefaultModelState):
    """Gives slots their weights as requests come, and the model each step's rows before its forward pass."""

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        weights = self.model.weights
        weights.put(req_index, mixture_of(new_req_data.sampling_params.extra_args, weights.models))

    def preprocess_state(self, input_batch: InputBatch, *args, **options) -> None:
        super().preprocess_state(input_batch, *args, **options)
        weights = self.model.weights
        weights.settle(torch.from_numpy(input_batch.idx_mapping_np).long())
        weights.order = input_batch.expanded_idx_mapping
