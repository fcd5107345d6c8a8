// Reads the label map out of a PNG, exactly: the sample values themselves, not colours that went through a canvas.

const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];
const GREY = 0;
const INDEXED = 3;

/**
 * PNG bytes -> {width, height, values}, with `values` a Uint8Array, or Uint16Array for 16 bits, row by row from the top.
 *
 * Reads what label maps come in: one sample per pixel, indexed with 1, 2, 4 or 8 bits or grey with up to 16, not
 * interlaced (PNG specification, W3C, 2003). Throws an Error that says what the file is instead.
 */
export async function readLabels(bytes) {
  const { header, data } = chunks(bytes);
  const { width, height, depth } = header;
  const stride = Math.ceil((width * depth) / 8);
  const rows = await inflate(data);
  if (rows.length !== height * (stride + 1)) {
    throw new Error(`the PNG holds ${rows.length} bytes of rows where ${height * (stride + 1)} belong`);
  }
  const packed = unfilter(rows, stride, height, Math.max(1, depth / 8));
  return { width, height, values: unpack(packed, width, height, depth, stride) };
}

function chunks(bytes) {
  if (SIGNATURE.some((byte, index) => bytes[index] !== byte)) {
    throw new Error("the mask is not a PNG file");
  }
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let header = null;
  const data = [];
  let ended = false;
  for (let at = 8; !ended; ) {
    const length = at + 12 <= bytes.length ? view.getUint32(at) : Infinity;
    if (at + 12 + length > bytes.length) {
      throw new Error("the PNG is cut short");
    }
    const type = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    if (type === "IHDR") {
      header = readHeader(view, at + 8);
    } else if (type === "IDAT") {
      data.push(bytes.subarray(at + 8, at + 8 + length));
    }
    ended = type === "IEND";
    at += 12 + length;
  }
  if (!header) {
    throw new Error("the PNG has no header");
  }
  return { header, data };
}

function readHeader(view, at) {
  const [depth, kind, , , interlaced] = [8, 9, 10, 11, 12].map((offset) => view.getUint8(at + offset));
  if ((kind !== GREY && kind !== INDEXED) || interlaced) {
    throw new Error(`a PNG with colour type ${kind}${interlaced ? ", interlaced," : ""} is not a label map`);
  }
  return { width: view.getUint32(at), height: view.getUint32(at + 4), depth };
}

async function inflate(parts) {
  const stream = new Blob(parts).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Undo the filter of each row: what was sent is the difference to a prediction from neighbours already known. */
function unfilter(rows, stride, height, pixel) {
  const out = new Uint8Array(stride * height);
  for (let y = 0; y < height; y++) {
    const filter = rows[y * (stride + 1)];
    const from = y * (stride + 1) + 1;
    const to = y * stride;
    if (filter === 0) {
      out.set(rows.subarray(from, from + stride), to);
      continue;
    }
    for (let x = 0; x < stride; x++) {
      const left = x >= pixel ? out[to + x - pixel] : 0;
      const up = y > 0 ? out[to + x - stride] : 0;
      const corner = x >= pixel && y > 0 ? out[to + x - stride - pixel] : 0;
      out[to + x] = rows[from + x] + predicted(filter, left, up, corner);
    }
  }
  return out;
}

function predicted(filter, left, up, corner) {
  switch (filter) {
    case 1:
      return left;
    case 2:
      return up;
    case 3:
      return (left + up) >> 1;
    case 4:
      return paeth(left, up, corner);
    default:
      throw new Error(`the PNG has a row with filter ${filter}, which does not exist`);
  }
}

function paeth(left, up, corner) {
  const estimate = left + up - corner;
  const toLeft = Math.abs(estimate - left);
  const toUp = Math.abs(estimate - up);
  const toCorner = Math.abs(estimate - corner);
  if (toLeft <= toUp && toLeft <= toCorner) {
    return left;
  }
  return toUp <= toCorner ? up : corner;
}

/** Bytes -> one value per pixel; several pixels share a byte below 8 bits, the leftmost in its highest bits. */
function unpack(packed, width, height, depth, stride) {
  if (depth === 8) {
    return packed;
  }
  const values = depth === 16 ? new Uint16Array(width * height) : new Uint8Array(width * height);
  const most = 2 ** depth - 1;
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      const bit = x * depth;
      const at = y * stride + (bit >> 3);
      values[i] = depth === 16 ? (packed[at] << 8) | packed[at + 1] : (packed[at] >> (8 - depth - (bit & 7))) & most;
    }
  }
  return values;
}
