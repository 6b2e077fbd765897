// Who else computes on this machine: the board of shared/cores.py, read while a long step runs.
#pragma once

#include <time.h>

#include "slipstream_cpu.h"

namespace slipstream {

// Neighbouring cores, by number among those this process may use.
struct Share {
    int first, count;
    bool operator==(const Share& other) const { return first == other.first && count == other.count; }
};

// As CoreShare.cores: an equal share of the cores among those who compute, lower slots first; at least 1.
inline Share share_at(const sl_cores& cores, uint64_t now_ns) {
    constexpr uint64_t BETWEEN_STEPS_NS = 5000000;
    int others = 0, before = 0;
    for (int slot = 0; slot < cores.num_slots; slot++) {
        if (slot == cores.slot || __atomic_load_n(&cores.words[slot], __ATOMIC_RELAXED) <= now_ns - BETWEEN_STEPS_NS) continue;
        others++;
        before += slot < cores.slot;
    }
    int each = cores.num_cores / (others + 1), rest = cores.num_cores % (others + 1);
    if (each == 0) return Share{before % cores.num_cores, 1};
    return Share{before * each + (before < rest ? before : rest), each + (before < rest)};
}

inline uint64_t monotonic_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

}  // namespace slipstream
