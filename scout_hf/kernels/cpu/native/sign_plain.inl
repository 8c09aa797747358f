// The attention mass of every block by sign codes, for processors without table shuffles.
namespace {

bool signs_fit(int) { return true; }

void signs(const scout_signs* s) {
  uint16_t tables[SCOUT_MAX_HEAD_DIM / 8][256], sums[SCOUT_MAX_BLOCK];
  for (int h = 0; h < s->heads; h++) {
    for (int row = 0; row < s->rows; row++) {
      const uint8_t* low = s->tables + ((int64_t)h * 2 * s->rows + 2 * row) * 16;
      for (int byte = 0; byte < 256; byte++) tables[row][byte] = (uint16_t)(low[byte & 15] + low[16 + (byte >> 4)]);
    }
    for (int64_t block = 0; block < s->blocks; block++) {
      const uint8_t* code = s->codes + (s->ids ? s->ids[block] : block) * s->code_bytes;
      for (int t = 0; t < s->block_size; t++) sums[t] = tables[0][code[t]];
      for (int row = 1; row < s->rows; row++) {
        code += s->block_size;
        for (int t = 0; t < s->block_size; t++) sums[t] = (uint16_t)(sums[t] + tables[row][code[t]]);
      }
      code += s->scales - (int64_t)(s->rows - 1) * s->block_size;
      float mass = 0.0f;
      for (int t = 0; t < s->block_size; t++) {
        const uint32_t bits = ((uint32_t)code[t] << 19) + (120u << 23);
        float scale;
        __builtin_memcpy(&scale, &bits, sizeof scale);
        const float factor = s->worth[h] * 0x1p23f, one = (127 - s->reference[h]) * 0x1p23f;
        float x = (float)(sums[t] - s->offsets[h]) * scale * factor + one;
        x = x > 0x1p23f ? x : 0x1p23f;
        const int32_t power_bits = (int32_t)(x < 253 * 0x1p23f ? x : 253 * 0x1p23f);
        float power;
        __builtin_memcpy(&power, &power_bits, sizeof power);
        mass += power;
      }
      s->out[h * s->out_stride + block] = mass;
    }
  }
}

void peaks(const scout_signs* s) {
  for (int h = 0; h < s->heads; h++) {
    const uint8_t* tables = s->tables + (int64_t)h * 2 * s->rows * 16;
    for (int64_t block = 0; block < s->blocks; block++) {
      const uint8_t* code = s->codes + (s->ids ? s->ids[block] : block) * s->code_bytes;
      int most = INT16_MIN;
      for (int t = 0; t < s->block_size; t++) {
        int sum = -s->offsets[h];
        for (int row = 0; row < s->rows; row++) {
          const uint8_t byte = code[row * s->block_size + t];
          sum += tables[2 * row * 16 + (byte & 15)] + tables[(2 * row + 1) * 16 + (byte >> 4)];
        }
        const int scale = code[s->scales + t], power = (scale >> 4) - 3;
        const int factor = (16 + (scale & 15)) * (power < 0 ? 1 : power < 8 ? 1 << power : 255) * 4;
        const int logit = (sum * 256 * factor) >> 16;
        most = logit > most ? logit : most;
      }
      s->out[h * s->out_stride + block] = (float)most * (s->worth[h] * 0.25f);
    }
  }
}

}  // namespace
