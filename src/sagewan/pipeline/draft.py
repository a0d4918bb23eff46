"""The plan of a request that is not complete yet: any prompt and any picture give the same one."""

from dataclasses import replace
from pathlib import Path

from sagewan.pipeline.decide import check_calibrated, stored_evidence, with_magnitudes
from sagewan.plan.evidence import Evidence
from sagewan.plan.hardware import Hardware
from sagewan.plan.models import IMAGE_TO_VIDEO, TEXT_TO_VIDEO, Model
from sagewan.plan.plan import Plan, make_plan
from sagewan.plan.request import Request

# What a plan does not depend on, where it is not given.
ANY_PROMPT = "any prompt"
_ANY_PICTURE = Path("any picture")


def draft_plan(request: Request, hardware: Hardware, *, real: bool = True) -> Plan:
    """What would run; nothing is loaded, and no torch imported. With ``real``, the hardware is
    this machine's, and what was learnt on it counts.

    Raises as :func:`sagewan.plan.plan.make_plan`, and CheckpointError for a model that is not
    known; its files need not be there.
    """
    from sagewan.checkpoint.find import find_model
    from sagewan.checkpoint.lora import find_loras

    model = find_model(request.model, need_files=False)
    if request.prompt == ANY_PROMPT:
        model = replace(model, words={})
    request = _with_picture(request, model)
    loras = find_loras(request.lora, model)
    plan = make_plan(request, model, hardware, Evidence(), loras)
    # What was measured of the model holds on any hardware.
    evidence = stored_evidence(plan, hardware) if real else with_magnitudes(Evidence(), plan)
    plan = make_plan(request, model, hardware, evidence, loras)
    if real:
        check_calibrated(plan)
    return plan


def _with_picture(request: Request, model: Model) -> Request:
    """A model that starts from pictures is planned without them just as well."""
    if TEXT_TO_VIDEO not in model.tasks:
        request = replace(request, image=request.image or _ANY_PICTURE)
        if IMAGE_TO_VIDEO not in model.tasks:
            request = replace(request, last_image=request.last_image or _ANY_PICTURE)
    return request
