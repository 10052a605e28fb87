"""`python -m jobs.llm.llama_cpp.quantize SOURCE TARGET FILE_TYPE THREADS [IMATRIX]`: write a GGUF file in another precision.

FILE_TYPE is a name of `schema.training.llm_export.GgufQuantization` except `none`; IMATRIX is the output of llama-imatrix.
Exit code 0 means that the file is written.
"""

import ctypes
import sys

# Names of llama.cpp's constants.
FILE_TYPES = {
    "f32": "LLAMA_FTYPE_ALL_F32",
    "f16": "LLAMA_FTYPE_MOSTLY_F16",
    "bf16": "LLAMA_FTYPE_MOSTLY_BF16",
    "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0",
    "q6_k": "LLAMA_FTYPE_MOSTLY_Q6_K",
    "q5_k_m": "LLAMA_FTYPE_MOSTLY_Q5_K_M",
    "q5_k_s": "LLAMA_FTYPE_MOSTLY_Q5_K_S",
    "q5_0": "LLAMA_FTYPE_MOSTLY_Q5_0",
    "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M",
    "q4_k_s": "LLAMA_FTYPE_MOSTLY_Q4_K_S",
    "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0",
    "q3_k_m": "LLAMA_FTYPE_MOSTLY_Q3_K_M",
    "q2_k": "LLAMA_FTYPE_MOSTLY_Q2_K",
}


def main(source: str, target: str, file_type: str, threads: str, imatrix: str = "") -> int:
    """Quantize; returns llama.cpp's code, 0 for success."""
    import llama_cpp

    from jobs.llm.llama_cpp.gguf_reader import read_imatrix
    from jobs.llm.llama_cpp.log import log_errors_only

    log_errors_only()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, FILE_TYPES[file_type])
    params.nthread = int(threads)
    weights = read_imatrix(imatrix) if imatrix else {}
    if weights:
        float_pointer = ctypes.POINTER(ctypes.c_float)
        entries = [
            llama_cpp.llama_model_imatrix_data(name.encode(), values.ctypes.data_as(float_pointer), len(values))
            for name, values in weights.items()
        ]
        # An empty last entry ends the array.
        params.imatrix = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))(*entries)
    return llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
