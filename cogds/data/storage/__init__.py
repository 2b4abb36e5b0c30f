"""Files wherever they lie: on disks, behind URLs (through fsspec), and in tar files."""
