"""CUDA code of the tests' own, compiled for the emulator."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CXX = os.environ.get("CXX", "c++")
WITH_COMPILER = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"there is no C++ compiler ({CXX})")

PRELUDE = (
    f'#include "{ROOT}/csrc/common/cuda.h"\n'
    + r"""
#include <cstdio>
#include <vector>
using namespace fastconv;

#define FASTCONV_TEST(name) extern "C" __attribute__((visibility("default"))) const char* name
template <typename Body>
const char* message_of(const Body& body) {  // the error that a launch ends with
  static std::string message;
  message.clear();
  try { body(); } catch (const std::exception& error) { message = error.what(); }
  return message.c_str();
}
"""
)


def compile_cuda(source: Path, target: Path, *flags: str) -> None:
    objects = sorted((ROOT / "csrc/emulator").glob("*.cpp"))
    subprocess.run(
        [CXX, "-std=c++20", "-O1", "-g", "-fvisibility=hidden", "-DFASTCONV_EMULATOR"]
        + [
            f"-I{ROOT}/csrc/emulator",
            *flags,
            *map(str, objects),
            "-x",
            "c++",
            str(source),
            "-o",
            str(target),
        ],
        check=True,
    )
