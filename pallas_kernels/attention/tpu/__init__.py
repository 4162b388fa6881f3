"""Block-sparse attention on TPUs: mosaic_tpu (launch), mosaic_tpu_kernel (body), mosaic_tpu_loads (DMAs)."""
