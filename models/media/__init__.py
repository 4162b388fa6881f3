"""Videos and images from files, streams and arrays."""

from models.media.image import Image as Image
from models.media.image import read_image as read_image
from models.media.sampling import MAX_FRAMES as MAX_FRAMES
from models.media.video import Video as Video
from models.media.video import read_video as read_video
from models.media.video_stream import VideoStream as VideoStream
