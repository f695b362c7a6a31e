"""Conversions between adapters' dialects change nothing without a message: a sample of conversions.py."""

from anima_jax.adapters.dialects import DIALECTS
from tests.adapters.conversions import OF_PEFT, Case, cases, outcomes

SAMPLE = list(cases())[::16]


def expected(case, dialect: str) -> str:
    """PEFT's settings are for LoRA, DoRA, LoKr and LoHa, of which diffusers lacks LoHa; a ComfyUI file has no alpha for
    a LoKr of two matrices, so that PEFT's is multiplied into one: exactly, if it is a power of two."""
    of_peft = OF_PEFT.get(case.kind) or ("LORA" if case.kind == "lora of 1x1 convolutions" else None)
    if DIALECTS[dialect].settings:
        return "lossless" if of_peft and (of_peft, dialect) != ("LOHA", "diffusers") else "refused"
    with_scale = case.kind == "lokr of two matrices" and DIALECTS[case.dialect].settings
    return "rounded" if with_scale and case.alpha not in (None, 3.0) else "lossless"


def test_no_conversion_changes_an_adapter_without_a_message(tmp_path):
    assert [{getattr(case, field) for case in SAMPLE} for field in Case._fields] == [
        {getattr(case, field) for case in cases()} for field in Case._fields
    ]
    assert [row for row in outcomes(SAMPLE, tmp_path) if row[2] != expected(*row[:2])] == []
