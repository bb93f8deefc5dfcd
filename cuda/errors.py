"""What can be missing or go wrong below the kernels; higher floors translate these for users."""


class CudaError(RuntimeError):
    """Base of the errors of this floor."""


class MissingError(CudaError):
    """NVRTC, CUDA headers, CuPy, a driver or an architecture is missing; names what brings it."""


class CompileError(CudaError):
    """NVRTC refused a kernel.

    Attributes:
        log: NVRTC's own words.
    """

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log
