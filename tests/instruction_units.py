"""The unit of a multiprocessor that executes an instruction, and the bytes it moves."""

# Opcodes by unit. An opcode is a first word and modifiers, such as LDG.E.128; the first
# word determines the unit.
_UNITS = {
    "tensor": "HMMA IMMA DMMA BMMA",
    "mufu": "MUFU F2F F2I I2F FRND POPC FLO BREV",
    "fp32": "FFMA FADD FMUL HFMA2 HADD2 HMUL2 FFMA32I FADD32I FMUL32I",
    "imad": "IMAD",
    "fp64": "DFMA DADD DMUL DSETP",
    "alu": "IADD3 LOP3 SHF LEA ISETP FSETP FMNMX IMNMX VIMNMX VIADD VIADDMNMX SEL FSEL "
    "PRMT MOV PLOP3 IABS SGXT FSET F2FP I2FP CS2R P2R R2P FCHK BMSK HSETP2 HMNMX2 VOTE",
    "lds": "LDS",
    "ldsm": "LDSM",
    "sts": "STS ATOMS",
    "ldgsts": "LDGSTS",
    "ldg": "LDG LD",
    "stg": "STG ST ATOMG ATOM REDG RED",
    "local": "LDL STL",
    "shuffle": "SHFL MATCH",
    "control": "BRA BSSY BSYNC BREAK EXIT RET CALL BAR WARPSYNC DEPBAR LDGDEPBAR BRX "
    "YIELD MEMBAR ERRBAR CCTL CGAERRBAR ENDCOLLECTIVE BPT NANOSLEEP",
}
_UNIT_OF = {word: unit for unit, words in _UNITS.items() for word in words.split()}

# Units whose instructions move data between registers, shared memory and the caches.
MEMORY = "lds", "ldsm", "sts", "ldgsts", "ldg", "stg", "local", "shuffle"


def unit_of(opcode: str) -> str:
    """Return the unit that executes an opcode, or ``"other"``.

    Opcodes that start with U, such as UIADD3, run once per warp on the uniform unit.
    """
    word = opcode.split(".")[0]
    if word in _UNIT_OF:
        return _UNIT_OF[word]
    return "uniform" if word.startswith("U") or word == "R2UR" else "other"


def lane_bytes(opcode: str) -> int:
    """Return how many bytes a load, store or copy moves per lane."""
    words = opcode.split(".")
    # LDSM loads 1, 2 or 4 matrices, each of 4 bytes per lane.
    if words[0] == "LDSM":
        return 4 * int(words[-1]) if words[-1] in "124" else 4
    # A modifier gives the bits: 128, or U8 and S16 for signed and unsigned integers.
    for size in (128, 64, 16, 8):
        if any(word in (f"{size}", f"U{size}", f"S{size}") for word in words):
            return size // 8
    return 4  # 32 bits have no modifier
