"""Why something can't run: a code with values, and the sentence made from them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

SENTENCES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "en": MappingProxyType(
            {
                "needs-cuda": "needs an NVIDIA GPU, and {device} is not one",
                "compute-capability": (
                    "needs compute capability {needed}, and {device} has {found}"
                ),
                "no-kernel": "this version has no kernel for it",
                "package-missing": "the package {package} is not installed ({install})",
                "package-version": "needs {package} {needed}, and {found} is installed",
                "platform": "does not run on {found}, only on {needed}",
                "head-dim": "takes head sizes {needed}, and the model's is {found}",
                "dtype": "takes {needed}, and the model runs in {found}",
                "log-sum-exp": "does not return the log-sum-exp",
                "grouped-heads": "does not take fewer key heads than query heads",
                "key-padding": (
                    "takes the padding of its last block of {block} keys for keys, which would "
                    "show with only {found}"
                ),
                "import-failed": "the package {package} can't be imported ({error})",
                "function-missing": "the package {package} has no function {function}",
                "self-test-error": (
                    "its self-test gave an error of {error}, above the {limit} of its class"
                ),
                "self-test-not-finite": "its self-test gave NaN or infinite values",
                "self-test-changed-inputs": "its self-test found that it changes its inputs",
                "self-test-crashed": "its self-test failed ({error})",
                "self-test-no-memory": (
                    "its self-test found too little free memory ({error}); "
                    "sagewan doctor tries it again"
                ),
                "self-test-timeout": (
                    "its self-test gave no answer within {seconds} s; sagewan doctor tries it again"
                ),
                "run-not-finite": "its result stopped being finite at step {step}",
                "run-failed": "it failed while running ({error})",
                "no-more-precise": "is no more precise than {mode}, whose result was not finite",
                "format": "takes weights in {needed}, and these are in {found}",
                "policy-16-bit": "rounds its input too, and these layers are to multiply in 16 bit",
                "rows": "is not the fastest for {found} rows",
                "sides": "takes matrices whose sides are multiples of {needed}",
                "emulation-only": (
                    "this version can only emulate it (--emulate: exact arithmetic, slow)"
                ),
            }
        )
    }
)


@dataclass(frozen=True)
class Objection:
    """A refusal as plain data: ``code`` names the sentence, ``values`` fill it in."""

    code: str
    values: Mapping[str, str] = field(default_factory=dict, hash=False)

    def sentence(self, language: str = "en") -> str:
        """The refusal in words, without a subject and without a full stop."""
        return SENTENCES[language][self.code].format(**self.values)
