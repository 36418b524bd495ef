// Memory of a thread's own, kept from call to call.
#pragma once

#include <cstddef>
#include <vector>

namespace clk {

inline constexpr size_t kKeptBytes = size_t{32} << 20;  // what a thread keeps for its next call

class KeptMemory {
  public:
    // At least `bytes`, aligned for doubles; what was there before is lost.
    void* take(size_t bytes) {
        const size_t wanted = (bytes + sizeof(double) - 1) / sizeof(double);
        if (values_.size() < wanted) {
            std::vector<double>().swap(values_);  // never both at once
            values_.resize(wanted);
        }
        return values_.data();
    }
    // At the end of a call: what is large goes back.
    void release() {
        if (values_.size() * sizeof(double) > kKeptBytes) std::vector<double>().swap(values_);
    }

  private:
    std::vector<double> values_;
};

}  // namespace clk
