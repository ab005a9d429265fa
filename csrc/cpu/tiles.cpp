// Makes the tiles of weight rows, once a weight: plain C++, bound by memory anyway. See kernels.h for the format.
#include <cstring>
#include <vector>

#include "kernels.h"

namespace qat {
namespace {

// One row's codes t + 1 in natural order, [K].
void read_row(const Tiling& p, int64_t row, int64_t k, uint8_t* codes) {
  const auto* bytes = static_cast<const uint8_t*>(p.rows) + row * p.row_bytes;
  if (p.source == Source::codes) {
    for (int64_t i = 0; i < k; ++i) codes[i] = static_cast<uint8_t>(bytes[i] + 1);
  } else if (p.source == Source::bits) {
    for (int64_t i = 0; i < k; ++i) codes[i] = bytes[i >> 2] >> (2 * (i & 3)) & 3;
  } else {
    for (int64_t i = 0; i < k;) {
      for (uint32_t v = bytes[i / 5], last = 0; last < 5 && i < k; ++last, ++i, v /= 3) codes[i] = static_cast<uint8_t>(v % 3);
    }
  }
}

uint32_t field_byte(const uint8_t* codes) {
  uint32_t four;
  std::memcpy(&four, codes, 4);
  return (four | four >> 6 | four >> 12 | four >> 18) & 255;
}

uint32_t field_word(const uint8_t* codes) {
  return field_byte(codes) | field_byte(codes + 4) << 8 | field_byte(codes + 8) << 16 | field_byte(codes + 12) << 24;
}

// Word i of a superblock of 80 codes.
uint32_t base3_word(const uint8_t* codes, int i) {
  uint32_t word = 0;
  for (int b = 0; b < 4; ++b) {
    const uint8_t* four = codes + 16 * i + 4 * b;
    const uint32_t c = four[0] + 3u * four[1] + 9u * four[2] + 27u * four[3];
    word |= base3_store(c, codes[64 + 4 * b + i]) << (8 * b);
  }
  return word;
}

void write_row(const Tiling& p, const uint8_t* codes, uint32_t* panel_tiles) {
  const int64_t padded = p.segments.row();
  if (p.base3) {
    for (int64_t s = 0; s < padded / kSuperBlock; ++s)
      for (int i = 0; i < 4; ++i) panel_tiles[(4 * s + i) * kPanel] = base3_word(codes + s * kSuperBlock, i);
  } else {
    for (int64_t block = 0; block < padded / kBlock; ++block) panel_tiles[block * kPanel] = field_word(codes + block * kBlock);
  }
}

}  // namespace

void make_tiles(const Tiling& p, int64_t begin, int64_t end) {
  const Segments& s = p.segments;
  const int64_t k = s.count * s.length;
  std::vector<uint8_t> natural(static_cast<size_t>(k)), padded(static_cast<size_t>(s.row()), 1);
  for (int64_t panel = begin; panel < end; ++panel) {
    uint32_t* out = p.tiles + panel * s.count * s.words(p.base3);
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t row = panel * kPanel + lane;
      if (row < p.n) {
        read_row(p, row, k, natural.data());
      } else {
        std::memset(natural.data(), 1, natural.size());
      }
      for (int64_t g = 0; g < s.count; ++g)
        std::memcpy(padded.data() + g * s.padded, natural.data() + g * s.length, static_cast<size_t>(s.length));
      write_row(p, padded.data(), out + lane);
    }
  }
}

uint64_t fingerprint(const void* data, int64_t n) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  uint64_t lanes[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    for (int lane = 0; lane < 8; ++lane) {
      uint64_t word;
      std::memcpy(&word, bytes + i + 8 * lane, 8);
      lanes[lane] = (lanes[lane] ^ word) * 0x9e3779b97f4a7c15ull;
      lanes[lane] ^= lanes[lane] >> 29;
    }
  }
  uint64_t hash = static_cast<uint64_t>(n);
  for (; i < n; ++i) hash = (hash ^ bytes[i]) * 0x100000001b3ull;
  for (uint64_t lane : lanes) hash = (hash ^ lane) * 0x9e3779b97f4a7c15ull + (hash >> 31);
  return hash;
}

}  // namespace qat
