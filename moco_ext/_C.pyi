def build_info() -> dict[str, str]:
    """How the native libraries were built, and the CPU instruction set in use. See csrc/module.cpp."""
