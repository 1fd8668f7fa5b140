"""A T5 as ONNX, its weights in int8: `PYTHON onnx_export.py FOLDER TO`, for `serve.py`.

It needs an environment of its own, for optimum's exporter needs an older transformers than ours:

    pip install 'optimum[onnxruntime]<2' 'transformers<4.58' torch
"""

import sys
from pathlib import Path

from onnxruntime.quantization import QuantType, quantize_dynamic
from optimum.exporters.onnx import onnx_export_from_model
from transformers import T5ForConditionalGeneration


def main(folder: Path, to: Path) -> None:
    """Write encoder, decoder and decoder with a past, each in int8."""
    model = T5ForConditionalGeneration.from_pretrained(folder)
    onnx_export_from_model(model, to / "fp32", task="text2text-generation-with-past", do_validation=False)
    for name in ("encoder_model", "decoder_model", "decoder_with_past_model"):
        quantize_dynamic(to / "fp32" / f"{name}.onnx", to / f"{name}.onnx", weight_type=QuantType.QInt8)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
