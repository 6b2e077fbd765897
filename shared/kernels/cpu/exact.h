// Exponential and logarithm whose bits are those of shared/engine/exact.py: float64 operations in a fixed order, none fused.
#pragma once

#include <cstdint>
#include <cstring>

namespace SL_NS {

constexpr double LN2_HIGH = 0.6931471803691238, LN2_LOW = 1.9082149292705877e-10;

// e^x for |x| < 700. Without branches, so that loops over it become vector code.
inline double exponential(double x) {
    constexpr double to_whole = 0x1.8p52;  // added to a number it leaves the nearest integer in the low bits
    double shifted = x * 1.4426950408889634 + to_whole, k = shifted - to_whole;
    double r = (x - k * LN2_HIGH) - k * LN2_LOW;
    double p = 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    uint64_t bits;
    std::memcpy(&bits, &shifted, 8);
    bits = (bits + 1023) << 52;
    double scale;
    std::memcpy(&scale, &bits, 8);
    return p * scale;
}

// Natural logarithm of a positive normal number.
inline double logarithm(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, 8);
    double k = (double)((int64_t)(bits >> 52) - 1022), m;
    bits = (bits & 0xFFFFFFFFFFFFFull) | 0x3FE0000000000000ull;
    std::memcpy(&m, &bits, 8);
    if (m < 0.7071067811865476) {
        m += m;
        k -= 1.0;
    }
    double s = (m - 1.0) / (m + 1.0), square = s * s, p = 2.0 / 19.0;
    for (int n = 17; n > 0; n -= 2) p = p * square + 2.0 / n;
    return k * LN2_HIGH + (k * LN2_LOW + s * p);
}

}  // namespace SL_NS
