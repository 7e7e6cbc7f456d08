// What this program was built from and with: for --version, doctor, run folders and checkpoints.
#pragma once

#include <string>
#include <vector>

namespace fathom {

struct BuildInfo {
  std::string version;  // "0.1.0"
  /// 40 hexadecimal digits, with "-dirty" behind them where tracked files differed; or "unknown".
  std::string git_sha;
  std::string compiler;                       // "GNU 12.2.0"
  std::string build_type;                     // "Release"
  std::vector<std::string> instruction_sets;  // copies of the CPU backend: "portable", "avx2", "avx512"
  std::string sanitizers;                     // "address,undefined"; empty: none
  bool cuda = false;                          // whether the CUDA parts are in
};

const BuildInfo& build_info();

/// "0.1.0 (0123456789ab, GNU 12.2.0, Release; CPU: portable avx2 avx512)", on one line.
std::string describe_build();

}  // namespace fathom
