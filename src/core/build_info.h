// What this program was built from and with: for --version, doctor, run folders and checkpoints.
#pragma once

#include <string>
#include <vector>

namespace fathom {

struct BuildInfo {
  std::string version;  // "0.1.0"
  std::string
      git_sha;  // 40 hexadecimal digits, "-dirty" behind them where tracked files were changed; or "unknown"
  std::string compiler;                       // "GNU 12.2.0"
  std::string build_type;                     // "Release"
  std::vector<std::string> instruction_sets;  // copies of the CPU backend: "portable", "avx2", "avx512"
  std::string sanitizers;                     // "address,undefined"; empty: none
  bool cuda = false;                          // whether the CUDA parts are in
};

const BuildInfo& build_info();

/// "0.1.0 (6c58948d0f1e, GNU 12.2.0, Release; CPU: portable avx2 avx512)", on one line.
std::string describe_build();

}  // namespace fathom
