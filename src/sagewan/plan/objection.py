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
                "block-mask": "can't leave out blocks of keys, as sparsity wants",
                "only-masked": "serves only where blocks of keys are left out",
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
                "self-test-crashed": (
                    "its self-test failed ({error}); sagewan doctor tries it again"
                ),
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
                "width": "takes rows of up to {needed} values, and the model's have {found}",
                "other-attention": "prepares Q and K for {needed}, and {found} attends",
                "sides": "takes matrices whose sides are multiples of {needed}",
                "emulation-only": (
                    "this version can only emulate it (--emulate: exact arithmetic, slow)"
                ),
            }
        ),
        "zh": MappingProxyType(
            {
                "needs-cuda": "需要 NVIDIA 显卡，而 {device} 不是",
                "compute-capability": "需要计算能力 {needed}，而 {device} 是 {found}",
                "no-kernel": "这个版本没有对应的内核",
                "package-missing": "没有安装软件包 {package}（{install}）",
                "package-version": "需要 {package} {needed}，而安装的是 {found}",
                "platform": "不能在 {found} 上运行，只能在 {needed} 上",
                "head-dim": "支持的头尺寸是 {needed}，而模型的是 {found}",
                "dtype": "支持 {needed}，而模型以 {found} 运行",
                "log-sum-exp": "不返回 log-sum-exp",
                "grouped-heads": "不支持键的头数少于查询的头数",
                "block-mask": "不能按稀疏要求略过键的分块",
                "only-masked": "只用于略过键的分块时",
                "key-padding": (
                    "会把最后一块（{block} 个键）的填充当作键，只有 {found} 个键时会显现出来"
                ),
                "import-failed": "软件包 {package} 无法导入（{error}）",
                "function-missing": "软件包 {package} 没有函数 {function}",
                "self-test-error": "自检误差为 {error}，超过该级别的上限 {limit}",
                "self-test-not-finite": "自检得到 NaN 或无穷大",
                "self-test-changed-inputs": "自检发现它会改动输入",
                "self-test-crashed": "自检失败（{error}）；sagewan doctor 会再试一次",
                "self-test-no-memory": "自检时空闲内存太少（{error}）；sagewan doctor 会再试一次",
                "self-test-timeout": "自检在 {seconds} 秒内没有结果；sagewan doctor 会再试一次",
                "run-not-finite": "它的结果在第 {step} 步不再是有限值",
                "run-failed": "运行时失败（{error}）",
                "no-more-precise": "并不比结果已非有限值的 {mode} 更精确",
                "format": "接受 {needed} 格式的权重，而这些是 {found}",
                "policy-16-bit": "也会舍入输入，而这些层要以 16 位相乘",
                "rows": "对 {found} 行来说不是最快的",
                "width": "支持每行最多 {needed} 个数值，而模型的是 {found}",
                "other-attention": "为 {needed} 准备 Q 和 K，而使用的是 {found}",
                "sides": "接受边长为 {needed} 的倍数的矩阵",
                "emulation-only": "这个版本只能模拟它（模拟：算术精确，但很慢）",
            }
        ),
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
