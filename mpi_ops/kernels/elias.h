// Elias gamma codes of standard levels, for the host: what QSGD sends in place of lanes.
//
// A code c is sent as the gamma code of |c| + 1, and one bit for the sign where c is not zero (1:
// it is negative). The gamma code of m with z + 1 bits is z zeros and m (P. Elias, "Universal
// codeword sets and representations of the integers", IEEE Transactions on Information Theory
// 21(2), 1975). Codes of `bits` bits take 1 to 2 * bits bits. A stream begins at the highest bit of
// its first byte; zeros fill its last word of 64 bits.
#pragma once

#include "elements.h"

// Without a name: each instruction set has its own copies of what is not inlined.
namespace gq {
namespace {

class BitWriter {
 public:
  explicit BitWriter(uint8_t* out) : next_(out) {}

  // Appends the lowest `length` bits of `bits`, which has no others. 1 <= length <= 32.
  inline __attribute__((always_inline)) void put(uint32_t bits, int length) {
    if (length < free_) {
      word_ = word_ << length | bits;
      free_ -= length;
      return;
    }
    const int rest = length - free_;
    flush(word_ << free_ | bits >> rest);
    word_ = bits;  // those above the rest leave the word before it is complete
    free_ = 64 - rest;
  }

  // Fills up the last word. Returns where the stream ends.
  uint8_t* finish() {
    if (free_ < 64) flush(word_ << free_);
    return next_;
  }

 private:
  inline __attribute__((always_inline)) void flush(uint64_t word) {
    const uint64_t bytes = __builtin_bswap64(word);
    __builtin_memcpy(next_, &bytes, sizeof bytes);
    next_ += sizeof bytes;
  }

  uint8_t* next_;
  uint64_t word_ = 0;  // its lowest 64 - free_ bits are not written yet
  int free_ = 64;
};

class BitReader {
 public:
  BitReader(const uint8_t* begin, const uint8_t* end) : next_(begin), end_(end) {}

  // Has at least 56 bits in the window, or all that are left.
  inline __attribute__((always_inline)) void refill() {
    if (end_ - next_ >= 8) {
      uint64_t bytes;
      __builtin_memcpy(&bytes, next_, sizeof bytes);
      window_ |= __builtin_bswap64(bytes) >> valid_;
      next_ += (63 - valid_) >> 3;
      valid_ |= 56;
      return;
    }
    for (; valid_ <= 56 && next_ != end_; valid_ += 8)
      window_ |= static_cast<uint64_t>(*next_++) << (56 - valid_);
  }

  // The next code of a width; false where there is none. `overdrawn` tells later whether the stream
  // had all of it.
  inline __attribute__((always_inline)) bool take(int bits, int32_t& code) {
    if (window_ >> (64 - bits) == 0) return false;
    const int zeros = __builtin_clzll(window_);
    const uint32_t signed_number = static_cast<uint32_t>(window_ >> (62 - 2 * zeros));
    const int32_t magnitude = static_cast<int32_t>(signed_number >> 1) - 1;
    const int32_t minus = -static_cast<int32_t>(signed_number & 1);
    // A first bit of one is the whole code of zero, which has no sign. (Not zeros > 0, which would
    // be known later: the next code waits for this length.)
    const int length = 2 * zeros + 2 - static_cast<int>(window_ >> 63);
    code = (magnitude ^ minus) - minus;
    window_ <<= length;
    valid_ -= length;
    return magnitude < 1 << (bits - 1);
  }

  bool overdrawn() const { return valid_ < 0; }

  // Whether nothing is left but the zeros of the last word.
  bool finished() {
    if (overdrawn() || valid_ + 8 * (end_ - next_) >= 64 || window_ != 0) return false;
    for (; next_ != end_; ++next_)
      if (*next_ != 0) return false;
    return true;
  }

 private:
  const uint8_t* next_;
  const uint8_t* end_;
  uint64_t window_ = 0;  // from its highest bit on; those that are not valid yet may be set
  int valid_ = 0;
};

}  // namespace
}  // namespace gq
