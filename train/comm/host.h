// What a rank says of the machine that it runs on.
#pragma once

#include <string>
#include <vector>

namespace fathom {

std::string host_name();

/// The addresses at which other hosts may reach this one: IPv4, numeric, of interfaces that are up;
/// none of the loopback.
std::vector<std::string> host_addresses();

}  // namespace fathom
