// Numbers for people: few digits, each with its unit.
#pragma once

#include <cstdint>
#include <string>

namespace fathom {

std::string format_count(double value);       // 950, 12.3k, 4.56M, 7.89G
std::string format_flops(double value);       // 1.20 TFLOP
std::string format_rate(double per_second);   // 103 GFLOP/s
std::string format_bytes(double bytes);       // 812 MiB
std::string format_duration(double seconds);  // 4.2 s, 3 min 05 s, 2 h 07 min, 3 d 04 h
std::string format_percent(double share);     // 12.5 %
std::string with_commas(std::int64_t value);  // 1,234,567

}  // namespace fathom
