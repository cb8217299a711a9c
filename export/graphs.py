"""The two exported graphs as modules with positional tensors in and out."""

from __future__ import annotations

from torch import Tensor, nn

from comask.models.comask import DIAGNOSTIC_OUTPUTS, STAGE1_OUTPUTS, STAGE2_OUTPUTS, CoMask


class Stage1Graph(nn.Module):
    """`images, image_sizes` → `p2 … p5, proposals, proposal_scores`."""

    def __init__(self, model: CoMask) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, ...]:
        """See `CoMask.stage1`."""
        outputs = self.model.stage1(images, image_sizes)
        return tuple(outputs[name] for name in STAGE1_OUTPUTS)


class Stage2Graph(nn.Module):
    """`p2 … p5, proposals, proposal_scores, image_sizes` → padded detections."""

    def __init__(self, model: CoMask, *, diagnostics: bool) -> None:
        super().__init__()
        self.model = model
        self.diagnostics = diagnostics
        self.output_names = STAGE2_OUTPUTS + (DIAGNOSTIC_OUTPUTS if diagnostics else ())

    def forward(
        self,
        p2: Tensor,
        p3: Tensor,
        p4: Tensor,
        p5: Tensor,
        proposals: Tensor,
        proposal_scores: Tensor,
        image_sizes: Tensor,
    ) -> tuple[Tensor, ...]:
        """See `CoMask.stage2`."""
        outputs = self.model.stage2(
            p2, p3, p4, p5, proposals, proposal_scores, image_sizes, diagnostics=self.diagnostics
        )
        return tuple(outputs[name] for name in self.output_names)
