// The number that the module and the Python side must agree on (ops/_native.py: ABI).
// Raise both whenever the signature of an entry point, or the meaning of an argument, changes.
#pragma once

namespace clk {
inline constexpr int kAbi = 3;
}
